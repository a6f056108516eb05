"""What stands in the figures: numbers, limits and names, not pixels."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from mnist_jax.reporting import plots
from mnist_jax.runs import statistics

DIGITS = tuple("0123456789")


def row(epoch, train, test, **more):
    """A line of metrics.jsonl whose losses are 1 less the accuracies."""
    found = {"train": train, "test": test, **more}
    loss = {f"{name}/loss": (1 - np.array(a)).tolist() for name, a in found.items()}
    accuracy = {f"{name}/accuracy": a for name, a in found.items()}
    return {"epoch": epoch, "step": epoch, **loss, **accuracy, "train_s": 2.0}


ONE = [row(1, 0.5, 0.6), row(2, 0.8, 0.75), row(3, 0.9, 0.7)]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def colour_of(artist) -> str:
    return to_hex(artist.get_color())


def test_a_digit_is_dark_on_white():
    image = np.arange(784, dtype=np.uint8).reshape(28, 28, 1)
    (axes,) = plots.digit(image, "5").axes
    (shown,) = axes.images
    np.testing.assert_array_equal(shown.get_array(), image[..., 0])
    assert shown.get_clim() == (0, 255)
    assert to_hex(shown.cmap(0.0)) == "#ffffff" and to_hex(shown.cmap(1.0)) == "#000000"
    assert axes.get_title(loc="left") == "5"


def test_samples_stand_in_rows_below_their_names():
    images = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8)
    (axes,) = plots.samples(images, [f"n{i}" for i in range(12)], columns=5).axes
    canvas = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    assert texts(axes) == [f"n{i}" for i in range(12)]
    for i, text in enumerate(axes.texts):
        x, y = text.get_position()
        below = canvas[int(y) + 10, int(x)]
        assert below == i
    assert np.isnan(canvas[-1, -1])  # where a thirteenth would be


def test_curves_of_one_run_are_named_by_what_was_measured():
    rows = [row(1, 0.5, 0.6, validation=0.4), row(2, 0.8, 0.7, validation=0.5)]
    upper, lower = plots.learning_curves({"mlp": rows}).axes
    drawn = {tuple(line.get_ydata()): colour_of(line) for line in lower.lines}
    assert set(drawn) == {(0.6, 0.7), (0.5, 0.8), (0.4, 0.5)}
    assert sorted(texts(lower)) == ["test 70.00 %", "train 80.00 %", "validation 50.00 %"]
    assert sorted(texts(upper)) == ["test 0.300", "train 0.200", "validation 0.500"]
    by_name = {text.get_text().split()[0]: colour_of(text) for text in lower.texts}
    assert by_name["test"] == drawn[0.6, 0.7]  # a name has its line's colour


def test_curves_of_several_runs_are_named_by_the_runs():
    _, lower = plots.learning_curves({"a": ONE, "b": ONE[:2]}).axes
    assert sorted(texts(lower)) == ["a 70.00 %", "b 75.00 %"]
    styles = [(line.get_linestyle(), len(line.get_xdata())) for line in lower.lines]
    assert sorted(styles) == [("-", 2), ("-", 3), (":", 2), (":", 3)]  # train is dotted
    colours = [
        {colour_of(line) for line in lower.lines if len(line.get_xdata()) == n} for n in (2, 3)
    ]
    assert [len(own) for own in colours] == [1, 1] and colours[0] != colours[1]


def test_members_are_a_mean_and_a_range_and_the_lost_are_left_out():
    lost = row(2, [0.7, 0.9, 0.1], [0.5, 0.7, 0.1])
    lost["test/loss"][2] = None
    _, lower = plots.learning_curves({"mlp": [row(1, [0.4, 0.6, 0.5], [0.2, 0.4, 0.3]), lost]}).axes
    test = next(line for line in lower.lines if colour_of(line) == plots.BLUE)
    np.testing.assert_allclose(test.get_ydata(), [0.3, 0.6])
    heights = [set(band.get_paths()[0].vertices[:, 1].round(6)) for band in lower.collections]
    assert {0.2, 0.4, 0.5, 0.7} in heights


def test_losses_far_apart_and_one_epoch_are_drawn_all_the_same():
    wild = [row(1, 0.5, 0.5) | {"train/loss": 1e30}, row(2, 0.5, 0.5)]
    for rows in (wild, ONE[:1]):
        figure = plots.learning_curves({"mlp": rows})
        ET.fromstring(plots.svg(figure))
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines)


def test_no_name_stands_upon_another():
    runs = {str(i): [row(1, 0.5, 0.9 + i * 1e-5)] for i in range(6)}
    for figure in (plots.learning_curves(runs), plots.accuracy_against_time(runs)):
        figure.draw_without_rendering()
        axes = figure.axes[-1]
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 6
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_time_is_the_sum_of_the_epochs_on_a_logarithmic_scale():
    (axes,) = plots.accuracy_against_time({"a": ONE}).axes
    (line,) = axes.lines
    assert axes.get_xscale() == "log"
    assert line.get_xdata().tolist() == [2.0, 4.0, 6.0]
    assert list(line.get_ydata()) == [0.6, 0.75, 0.7]
    assert texts(axes) == ["a 70.00 %"]


def test_confusion_has_each_count_in_its_cell():
    counts = np.diag(np.arange(10, 20))
    counts[3, 5], counts[5, 3] = 7, 1
    (axes,) = plots.confusion(counts, DIGITS).axes
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {(c, r): str(n) for (r, c), n in np.ndenumerate(counts) if n}  # 0 is left out
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(DIGITS)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answer", "label")
    assert axes.yaxis_inverted()  # the first class above
    strength = {tuple(c.get_xy()): c.get_alpha() for c in axes.patches}
    assert strength[4.5, 2.5] > strength[2.5, 4.5]  # seven errors and one


def test_long_class_names_are_turned():
    names = ["Ankle boot"] * 10
    (axes,) = plots.confusion(np.eye(10, dtype=int), names).axes
    assert {tick.get_rotation() for tick in axes.get_xticklabels()} == {90}


def test_errors_show_label_answer_and_probability():
    probabilities = np.array([[0.1, 0.9], [0.75, 0.25]])
    images = np.zeros((2, 28, 28, 1), np.uint8)
    figure = plots.worst_errors(images, np.array([0, 1]), probabilities, ("0", "1"))
    assert texts(figure.axes[0]) == ["0 → 1\n90.00 %", "1 → 0\n75.00 %"]
    figure = plots.worst_errors(images, np.array([0, 1]), probabilities, ("Coat", "Shirt"))
    assert texts(figure.axes[0]) == ["Coat\n→ Shirt\n90.00 %", "Shirt\n→ Coat\n75.00 %"]


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_weights_are_coloured_symmetrically_around_0(sign):
    tiles = sign * np.linspace(-0.1, 2.0, 640).reshape(10, 8, 8)
    figure = plots.weights(tiles, DIGITS, columns=5)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0
    assert high <= 2.0
    assert texts(figure.axes[0]) == list(DIGITS)
    middle = figure.axes[0].images[0].cmap(0.5)[:3]
    assert min(middle) > 0.95  # nearly white


def test_reliability_by_hand():
    """Of four answers at 0.9 two are right, of one at 0.6 one."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]])
    bins = statistics.calibration_bins(probabilities, np.array([0, 0, 1, 1, 0]))
    upper, lower = plots.reliability(bins).axes
    points = next(line for line in upper.lines if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xydata(), [[0.6, 1.0], [0.9, 0.5]])
    assert texts(upper) == ["calibration error 40.00 %"]  # (4 · 0.4 + 1 · 0.4) / 5
    assert texts(lower) == ["1", "4"]
    assert [bar.get_height() for bar in lower.patches] == [1, 4]
    assert lower.get_yscale() == "log"


def test_networks_that_answer_alike_make_no_interval_narrower():
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]])
    label = np.array([0, 0, 1, 1, 0])
    one, three = (
        plots.reliability(statistics.calibration_bins(answers, label), networks=len(answers))
        for answers in (probabilities[None], np.stack([probabilities] * 3))
    )
    (lines,), (same,) = (figure.axes[0].collections for figure in (one, three))
    np.testing.assert_allclose(same.get_segments(), lines.get_segments())


def some_figure():
    counts = np.arange(100).reshape(10, 10)
    return plots.confusion(counts, DIGITS)


def test_the_same_data_gives_the_same_bytes_and_no_date():
    first, second = some_figure(), some_figure()
    for write in (plots.svg, plots.png):
        assert write(first) == write(second) == write(first)
    for word in (b"dc:date", b"dc:creator", b"tEXtSoftware", b"tEXtCreation"):
        assert word not in plots.svg(first) + plots.png(first)


def test_a_dark_page_gets_each_colour_s_other():
    drawn = plots.svg(some_figure())
    light, dark = drawn.decode(), plots.darkened(drawn).decode()
    ET.fromstring(dark)
    used = [colour for colour in plots.DARK if colour in light]
    assert {plots.PAPER, plots.INK, plots.BLUE, plots.VERMILION} <= set(used)
    for colour in used:
        assert colour not in dark
        assert plots.DARK[colour] in dark


def luminance(colour: str) -> float:
    """WCAG's, of sRGB."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("colour", [plots.INK, plots.MUTED, *plots.SERIES])
def test_text_can_be_read_on_either_page(colour):
    """A contrast of 4.5, as WCAG asks of small text."""
    for text, page in ((colour, plots.PAPER), (plots.DARK[colour], plots.DARK[plots.PAPER])):
        low, high = sorted((luminance(text), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_user_s_own_style_is_neither_used_nor_changed():
    expected = plots.svg(some_figure())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "x"}):
        before = dict(matplotlib.rcParams)
        assert plots.svg(some_figure()) == expected
        assert dict(matplotlib.rcParams) == before


def test_pixels_are_those_of_the_figure():
    found = plots.pixels(some_figure())
    assert (found.ndim, found.shape[2], found.dtype) == (3, 3, np.uint8)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found.min() < 100


def test_pyplot_is_left_alone():
    code = "import sys, mnist_jax.reporting.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
