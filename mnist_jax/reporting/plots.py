"""Figures: each function takes plain data and returns one, drawn for a white page.

`darkened` gives its SVG the colours for a dark one. Nothing is drawn through pyplot, so no state is
shared with the caller, and the same data gives the same bytes.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from mnist_jax.metrics import finite_members, mean_over_members
from mnist_jax.runs.statistics import CalibrationBins, binomial_ci95, percent

Rows = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

PAPER, INK, MUTED, FAINT = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
# The hues of Okabe and Ito (2008), which can be told apart with any colour vision: darkened, so
# that text in them can be read on white.
SERIES = ("#0068a5", "#b54500", "#00735a", "#95457a", "#806000", "#444c56")
BLUE, VERMILION = SERIES[:2]
DARK = {
    PAPER: "#0f1216",
    INK: "#e6edf3",
    MUTED: "#9da7b1",
    FAINT: "#373e47",
    **dict(
        zip(SERIES, ("#56b4e9", "#ff8f4d", "#2fc79c", "#e39bc8", "#e0b83a", "#b6bec7"), strict=True)
    ),
}
WIDTH = 5.4  # inches: about 520 pixels, so that 10-point text is read on a phone too
STYLE: Mapping[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": PAPER,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "image.interpolation": "none",  # an SVG then holds the pixels as they are
    "savefig.facecolor": PAPER,
    "svg.hashsalt": "mnist_jax",  # else names in an SVG change from time to time
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """This file's style, whatever the user's own settings are, which come back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _settle(figure: Figure) -> None:
    """Lays the figure out for good: each drawing would move its parts a little further."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, in the colours for a white page."""
    file = io.BytesIO()
    with _style():
        _settle(figure)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def darkened(drawn: bytes) -> bytes:
    """An SVG file of this module in the colours for a dark page."""
    for light, dark in DARK.items():
        drawn = drawn.replace(light.encode(), dark.encode())
    return drawn


def png(figure: Figure, *, dpi: int = 192) -> bytes:
    """The figure as a PNG file, for a white page."""
    file = io.BytesIO()
    with _style():
        _settle(figure)
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def pixels(figure: Figure) -> np.ndarray:
    """The figure as (height, width, 3) uint8."""
    with _style():
        _settle(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@_style()
def digit(image: np.ndarray, name: str) -> Figure:
    """One image (28, 28, 1) uint8, its ink dark on white, with the numbers of its pixels."""
    figure = Figure((3.2, 3.4))
    axes = figure.add_subplot()
    axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=255)
    axes.grid(visible=False)
    axes.set(title=name, xticks=(0, 9, 18, 27), yticks=(0, 9, 18, 27))
    axes.spines[:].set_visible(True)
    axes.tick_params(left=True)
    return figure


@_style()
def samples(images: np.ndarray, names: Sequence[str], *, columns: int = 10) -> Figure:
    """Images (n, 28, 28, 1) uint8, ink dark on white, each below its name."""
    return _grid(images[..., 0], names, columns=columns, cmap="gray_r", vmin=0, vmax=255)[0]


@_style()
def worst_errors(
    images: np.ndarray,
    label: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    *,
    columns: int = 6,
) -> Figure:
    """Images that a model is wrong about: each with its label, the answer and its probability.

    Args:
        images: (n, 28, 28, 1) uint8, in the order they are shown.
        label: (n,) int.
        probabilities: (n, classes), what the model gives each of its images.
        class_names: by label.
        columns: how many stand side by side.
    """
    names = [
        f"{class_names[true]} → {class_names[row.argmax()]}\n{percent(row.max())}"
        for true, row in zip(label, probabilities, strict=True)
    ]
    if max(map(len, class_names)) > 2:  # two such names do not fit in one line
        names = [name.replace(" → ", "\n→ ") for name in names]
    return _grid(images[..., 0], names, columns=columns, cmap="gray_r", vmin=0, vmax=255)[0]


@_style()
def weights(tiles: np.ndarray, names: Sequence[str] = (), *, columns: int = 8) -> Figure:
    """A layer's weights as images: blue where ink speaks for a unit, red where against it.

    Args:
        tiles: (n, height, width), an image for each unit.
        names: of the units; none where they have no meaning of their own.
        columns: how many stand side by side.
    """
    most = float(np.quantile(np.abs(tiles), 0.995)) or 1.0  # a few large ones would pale the rest
    figure, image = _grid(tiles, names, columns=columns, cmap="RdBu", vmin=-most, vmax=most)
    bar = figure.colorbar(
        image, orientation="horizontal", extend="both", shrink=0.5, aspect=30, pad=0.02
    )
    bar.set_ticks([-most, 0, most], labels=[f"{-most:.2g}", "0", f"{most:.2g}"])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def _grid(
    tiles: np.ndarray, names: Sequence[str], *, columns: int, **colours: Any
) -> tuple[Figure, Any]:
    """Tiles (n, height, width) in rows, each below its name, as one image with gaps in it."""
    n, height, width = tiles.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    scale = columns * width / WIDTH / 72 * 1.1  # pixels of a tile in a point, nearly
    lines = max((name.count("\n") + 1 for name in names), default=0)
    gap, above = max(1, round(3 * scale)), round(12 * scale * lines)
    step_y, step_x = height + gap + above, width + gap
    canvas = np.full((rows * step_y - gap, columns * step_x - gap), np.nan)  # which is not drawn
    figure = Figure((WIDTH, WIDTH * canvas.shape[0] / canvas.shape[1] + 0.1))
    axes = figure.add_subplot()
    axes.axis("off")
    for i, tile in enumerate(tiles):
        y, x = i // columns * step_y + above, i % columns * step_x
        canvas[y : y + height, x : x + width] = tile
        if names:
            axes.text(
                x + width / 2, y - 3 * scale, names[i], ha="center", va="bottom", size=9,
                linespacing=1.1,
            )  # fmt: skip
    return figure, axes.imshow(canvas, **colours)


@_style()
def learning_curves(runs: Mapping[str, Rows]) -> Figure:
    """Loss above and accuracy below, epoch by epoch.

    One run has a curve for train, one for test, and one for images that were held out. Of several
    runs each has a colour, and a dotted curve for train. Where a run has members, their mean is
    drawn, and the range from the least to the greatest is shaded.

    Args:
        runs: at least one epoch's lines, by the name each run is shown under.
    """
    alone = len(runs) == 1
    figure = Figure((WIDTH, 5.4))
    upper, lower = figure.subplots(2, sharex=True)
    for axes, metric in ((upper, "loss"), (lower, "accuracy")):
        ends = []
        for (run, rows), own in zip(runs.items(), itertools.cycle(SERIES), strict=False):
            for split, colour in zip(("test", "train", "validation"), SERIES, strict=False):
                if f"{split}/{metric}" not in rows[0] or (split == "validation" and not alone):
                    continue
                colour, name = (colour, split) if alone else (own, run)
                epochs = [row["epoch"] for row in rows]
                dotted = split == "train" and not alone
                end = _line(axes, epochs, rows, f"{split}/{metric}", colour, dotted=dotted)
                if not dotted:
                    shown = percent(end) if metric == "accuracy" else f"{end:#.3g}"
                    ends.append((epochs[-1], end, f"{name} {shown}", colour))
        axes.set_title(metric if alone else f"{metric} (dotted: train)")
        _name_ends(axes, ends)
    lower.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    lower.set_xlabel("epoch")
    return figure


@_style()
def accuracy_against_time(runs: Mapping[str, Rows]) -> Figure:
    """Test accuracy over the seconds spent on training, on a scale of powers of ten.

    Args:
        runs: at least one epoch's lines, by the name each run is shown under.
    """
    figure = Figure((WIDTH, 3.6))
    axes = figure.add_subplot()
    ends = []
    for (run, rows), colour in zip(runs.items(), itertools.cycle(SERIES), strict=False):
        seconds = np.cumsum([row["train_s"] for row in rows])
        end = _line(axes, seconds, rows, "test/accuracy", colour, marker="o")
        ends.append((seconds[-1], end, f"{run} {percent(end)}", colour))
    axes.set_xscale("log")
    axes.set(title="test accuracy", xlabel="seconds of training")
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: f"{s:g}"))
    _name_ends(axes, ends)
    return figure


def _line(
    axes: Axes,
    x: Any,
    rows: Rows,
    name: str,
    colour: str,
    *,
    dotted: bool = False,
    marker: str = "",
) -> float:
    """Draws the mean of a metric over the members, and their range; returns the last mean."""
    kept = [finite_members(row)[name] or [np.nan] for row in rows]
    mean = [mean_over_members(row, name) for row in rows]
    axes.plot(
        x,
        mean,
        color=colour,
        linestyle=":" if dotted else "-",
        marker=marker or ("o" if len(rows) == 1 else ""),
        markersize=4,
    )
    if any(len(values) > 1 for values in kept):
        axes.fill_between(
            x, [min(v) for v in kept], [max(v) for v in kept], color=colour, alpha=0.2, linewidth=0
        )
    return mean[-1]


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes a name behind each line's end (x, y, name, colour), and no name upon another."""
    ends = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    axes.autoscale_view()  # which is otherwise put off, and the places below are of these limits
    to_share = axes.transData + axes.transAxes.inverted()  # of the height, 0 to 1
    places = to_share.transform([(x, y) for x, y, _, _ in ends])[:, 1]
    least = 0.085 * np.arange(len(ends))  # a line of text each
    up = np.maximum.accumulate(places - least)
    down = np.minimum.accumulate((places - least)[::-1])[::-1]
    for (x, _, name, colour), place in zip(ends, (up + down) / 2 + least, strict=True):
        axes.annotate(
            name,
            (x, place),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
            bbox={"facecolor": PAPER, "alpha": 0.7, "linewidth": 0, "pad": 1},
        )


@_style()
def confusion(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Which class was taken for which, in numbers; the more errors, the stronger the colour.

    Args:
        counts: (classes, classes) int, a row for each label and a column for each answer.
        class_names: by label.
    """
    classes = len(counts)
    figure = Figure((WIDTH, WIDTH))
    axes = figure.add_subplot()
    most = max(1, int(counts[~np.eye(classes, dtype=bool)].max()))
    size = 9 if counts.max() < 10_000 else 7
    for (row, column), count in np.ndenumerate(counts):
        if count:
            # A colour that lets the page through suits a white one and a dark one.
            colour, alpha = (BLUE, 0.2) if row == column else (VERMILION, 0.1 + 0.5 * count / most)
            cell = Rectangle(
                (column - 0.5, row - 0.5), 1, 1, color=colour, alpha=alpha, linewidth=0
            )
            axes.add_patch(cell)
            axes.text(column, row, str(count), ha="center", va="center", size=size)
    long = max(map(len, class_names)) > 2
    axes.set(
        xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5), xlabel="answer", ylabel="label"
    )
    axes.set_xticks(range(classes), class_names, rotation=90 if long else 0)
    axes.set_yticks(range(classes), class_names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


@_style()
def reliability(bins: CalibrationBins, networks: int = 1) -> Figure:
    """Whether a model is right as often as it is sure: above, how often; below, of how many images.

    Args:
        bins: images by the probability of the answer. Bins without any are left out.
        networks: how many answered each image. Their answers to one are so alike that for the
            intervals they count as one.
    """
    figure = Figure((WIDTH, 5.4))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2.4, 1))
    edges = np.linspace(0, 1, len(bins.images) + 1)
    some = bins.images > 0
    count, correct = bins.images[some], bins.correct[some]
    per_image = ((pair / networks).round().astype(int) for pair in (correct, count))
    ends = [binomial_ci95(c, max(1, n)) for c, n in zip(*per_image, strict=True)]
    sure = bins.confidence[some] / count
    upper.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle="--")
    upper.vlines(sure, *np.transpose(ends), color=BLUE, linewidth=1, clip_on=False)
    upper.plot(sure, correct / count, "o", color=BLUE, markersize=5, clip_on=False)
    upper.set(ylim=(-0.03, 1.03), title="share of right answers")
    upper.text(0.02, 0.93, f"calibration error {percent(bins.error)}", transform=upper.transAxes)
    upper.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    lower.bar(edges[:-1][some], count, 0.94 * np.diff(edges)[some], align="edge", color=BLUE)
    lower.set_yscale("log")
    lower.set(xlim=(0, 1), ylim=(0.5, None), title="images", xlabel="probability of the answer")
    lower.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    lower.yaxis.set_visible(False)  # the bars carry their numbers
    lower.spines.left.set_visible(False)
    for middle, n in zip(((edges[1:] + edges[:-1]) / 2)[some], count, strict=True):
        lower.annotate(
            # No wider than its bar.
            str(n) if n < 10_000 else f"{n / 1000:.0f}k",
            (middle, n),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            size=8,
        )
    return figure
