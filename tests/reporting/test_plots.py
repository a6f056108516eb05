"""What the figures show: numbers, names and limits, not pixels."""

import numpy as np
from matplotlib.colors import to_hex

from mnist_jax.reporting import plots

DIGITS = tuple("0123456789")


def row(epoch, train, test, **more):
    splits = {"train": train, "test": test, **more}
    loss = {f"{name}/loss": (1 - np.array(a)).tolist() for name, a in splits.items()}
    accuracy = {f"{name}/accuracy": a for name, a in splits.items()}
    return {"epoch": epoch, "step": epoch, **loss, **accuracy, "train_s": 2.0}


ROWS = [row(1, 0.5, 0.6), row(2, 0.8, 0.75), row(3, 0.9, 0.7)]


def legend(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_samples_are_dark_on_white_in_rows_under_their_names():
    images = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 28, 28, 1), np.uint8)
    (axes,) = plots.samples(images, [f"n{i}" for i in range(12)], columns=5).axes
    shown = axes.images[0]
    canvas = np.ma.filled(shown.get_array().astype(float), np.nan)
    assert [text.get_text() for text in axes.texts] == [f"n{i}" for i in range(12)]
    for i, text in enumerate(axes.texts):
        x, y = text.get_position()
        assert canvas[int(y) + 10, int(x)] == i
    assert np.isnan(canvas[-1, -1])  # the place of a thirteenth
    assert shown.get_clim() == (0, 255)
    assert to_hex(shown.cmap(0.0)) == "#ffffff" and to_hex(shown.cmap(1.0)) == "#000000"


def test_samples_with_three_channels_are_in_colour():
    images = np.zeros((3, 32, 32, 3), np.uint8) + np.array([255, 0, 51], np.uint8)
    canvas = plots.samples(images, ["a", "b", "c"], columns=2).axes[0].images[0].get_array()
    np.testing.assert_allclose(canvas[31, 16], [1, 0, 0.2, 1])
    assert canvas[-1, -1, 3] == 0  # nothing is drawn there


def test_curves_are_named_after_the_splits_of_one_run_or_after_several_runs():
    rows = [row(1, 0.5, 0.6, validation=0.4), row(2, 0.8, 0.7, validation=0.5)]
    upper, lower = plots.learning_curves({"mlp": rows}).axes
    assert legend(lower.get_legend()) == ["test 70.00 %", "train 80.00 %", "validation 50.00 %"]
    assert legend(upper.get_legend()) == ["test 0.300", "train 0.200", "validation 0.500"]
    assert [tuple(line.get_ydata()) for line in lower.lines] == [(0.6, 0.7), (0.5, 0.8), (0.4, 0.5)]
    figure = plots.learning_curves({"a": ROWS, "b": ROWS[:2]})
    assert legend(*figure.legends) == ["a: 70.00 %", "b: 75.00 %"]  # once, of the accuracy
    _, lower = figure.axes
    lines = [(len(line.get_xdata()), line.get_linestyle()) for line in lower.lines]
    assert sorted(lines) == [(2, "-"), (2, ":"), (3, "-"), (3, ":")]  # train is dotted
    colours = {len(line.get_xdata()): to_hex(line.get_color()) for line in lower.lines}
    assert colours[2] != colours[3]
    (axes,) = plots.accuracy_against_time({"a": ROWS}).axes  # seconds are summed over the epochs
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 0.6], [4.0, 0.75], [6.0, 0.7]]


def test_members_are_drawn_as_mean_and_range_without_the_diverged():
    diverged = row(2, [0.7, 0.9, 0.1], [0.5, 0.7, 0.1])
    diverged["test/loss"][2] = None
    rows = [row(1, [0.4, 0.6, 0.5], [0.2, 0.4, 0.3]), diverged]
    _, lower = plots.learning_curves({"mlp": rows}).axes
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [0.3, 0.6])
    heights = set(lower.collections[0].get_paths()[0].vertices[:, 1].round(6))
    assert {0.2, 0.4, 0.5, 0.7} <= heights


def test_the_confusion_matrix_has_each_count_in_its_cell():
    counts = np.diag(np.arange(10, 20))
    counts[3, 5], counts[5, 3] = 7, 1
    (axes,) = plots.confusion_matrix(counts, ["Ankle boot", *DIGITS[1:]]).axes
    cells = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert cells == {(c, r): str(n) for (r, c), n in np.ndenumerate(counts) if n}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    errors = np.ma.filled(np.ma.masked_invalid(axes.images[0].get_array()), 0)
    assert errors[3, 5] == 7 and errors[5, 3] == 1 and errors.sum() == 8  # coloured by number
    assert {tick.get_rotation() for tick in axes.get_xticklabels()} == {90}  # long names
