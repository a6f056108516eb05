"""Matplotlib figures of a run. Each function takes plain arrays or rows and returns a Figure.

The figures do not use pyplot, so they share no state with the caller.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from mnist_jax.metrics import finite_members, member_means
from mnist_jax.runs.statistics import percent

Rows = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

# Okabe and Ito's hues (2008), which every kind of colour vision can tell apart, darkened so that
# text in these colours is readable on white.
COLOURS = ("#0068a5", "#b54500", "#00735a", "#95457a", "#806000", "#444c56")
WIDTH = 5.4  # inches; 10-point text stays readable on a phone
LEGEND_ROW = 0.2  # inches
STYLE = {
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": cycler(linestyle=("-", "--", "-.")) * cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.color": "#d1d9e0",
    "image.interpolation": "none",
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
    "text.parse_math": False,  # a class may be called $5
    "svg.hashsalt": "mnist_jax",  # the same figure gives the same bytes
}
styled = style.context(["default", STYLE])  # decorator: ignores the user's own matplotlibrc


@styled
def svg(figure: Figure) -> bytes:
    """The figure as an SVG file with a transparent background."""
    file = io.BytesIO()
    no_date = {"Date": None, "Creator": None}
    figure.savefig(file, format="svg", metadata=no_date, transparent=True)
    return file.getvalue()


@styled
def samples(images: np.ndarray, names: Sequence[str], *, columns: int = 10) -> Figure:
    """Images (n, height, width, channels) uint8, each under its name.

    In colour if there are three channels; else dark on white.
    """
    tiles = images.mean(-1)
    if images.shape[-1] == 3:
        tiles = np.insert(images, 3, 255, axis=-1) / 255  # opaque
    return _grid(tiles, names, columns=columns, cmap="gray_r", vmin=0, vmax=255)[0]


@styled
def weights(tiles: np.ndarray, names: Sequence[str] = (), *, columns: int = 8) -> Figure:
    """The weights of a layer, (units, height, width): blue is positive, red is negative."""
    limit = float(np.quantile(np.abs(tiles), 0.995)) or 1.0  # outliers would make the rest pale
    figure, image = _grid(tiles, names, columns=columns, cmap="RdBu", vmin=-limit, vmax=limit)
    bar = figure.colorbar(image, orientation="horizontal", extend="both", shrink=0.5, aspect=30)
    bar.set_ticks([-limit, 0, limit], labels=[f"{-limit:.2g}", "0", f"{limit:.2g}"])
    return figure


def _grid(
    tiles: np.ndarray, names: Sequence[str], *, columns: int, **colours: Any
) -> tuple[Figure, Any]:
    """Draws tiles (n, height, width), or RGBA (…, 4), as one image: faster than many axes."""
    n, height, width, *channels = tiles.shape
    longest = max(map(len, "\n".join(names).split("\n")))
    columns = min(columns, n, 78 // max(1, min(longest, 39)))  # 78 letters fit side by side
    rows = -(-n // columns)
    pixels_per_point = columns * width / WIDTH / 72 * 1.1
    lines = max((name.count("\n") + 1 for name in names), default=0)
    gap, title = max(1, round(3 * pixels_per_point)), round(12 * pixels_per_point * lines)
    step_y, step_x = height + gap + title, width + gap
    shape = rows * step_y - gap, columns * step_x - gap, *channels
    canvas = np.full(shape, 0.0 if channels else np.nan)  # transparent; NaN is not drawn
    ink = "#767676" if channels else "black"  # readable on white and on dark pages
    figure = Figure((WIDTH, WIDTH * canvas.shape[0] / canvas.shape[1] + 0.1))
    axes = figure.add_subplot()
    axes.axis("off")
    for i, tile in enumerate(tiles):
        y, x = i // columns * step_y + title, i % columns * step_x
        canvas[y : y + height, x : x + width] = tile
        if names:
            axes.text(x + width / 2, y - gap, names[i], ha="center", va="bottom", size=9, color=ink)
    return figure, axes.imshow(canvas, **colours)


@styled
def learning_curves(runs: Mapping[str, Rows]) -> Figure:
    """Loss and accuracy by epoch, of runs of at least one epoch by their names.

    One run has a curve for each split. Of several runs each has one colour: a solid curve for test
    and a dotted one for train.
    """
    more = len(runs) if len(runs) > 1 else 0
    figure = Figure((WIDTH, 5.6 + LEGEND_ROW * more))
    upper, lower = figure.subplots(2, sharex=True)
    for axes, metric in ((upper, "loss"), (lower, "accuracy")):
        for run, rows in runs.items():
            epochs = [row["epoch"] for row in rows]
            if len(runs) > 1:
                colour = _curve(axes, epochs, rows, f"test/{metric}", label=f"{run}:")
                _curve(axes, epochs, rows, f"train/{metric}", color=colour, linestyle=":")
                continue
            for split in ("test", "train", "validation"):
                if f"{split}/{metric}" in rows[0]:
                    _curve(axes, epochs, rows, f"{split}/{metric}", label=split)
        axes.set_title(metric if len(runs) == 1 else f"{metric} (dotted: train)")
        if len(runs) == 1:
            axes.legend()
    if len(runs) > 1:  # below, because names may be long
        figure.legend(*lower.get_legend_handles_labels(), loc="outside lower left")
    lower.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=" %"))
    lower.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    lower.set_xlabel("epoch")
    return figure


@styled
def accuracy_against_time(runs: Mapping[str, Rows]) -> Figure:
    """Test accuracy against seconds of training, of runs of at least one epoch by their names."""
    figure = Figure((WIDTH, 3.6 + LEGEND_ROW * len(runs)))
    axes = figure.add_subplot()
    for run, rows in runs.items():
        seconds = np.cumsum([row["train_s"] for row in rows])
        _curve(axes, seconds, rows, "test/accuracy", label=f"{run}:", marker="o")
    axes.set(title="test accuracy", xlabel="seconds of training", xscale="log")
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=" %"))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda s, _: f"{s:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(loc="outside lower left")
    return figure


def _curve(axes: Axes, x: Any, rows: Rows, name: str, *, label: str = "", **line: Any) -> Any:
    """Draws a metric's mean over the finite members, and their range; returns the colour."""
    mean = [member_means(row)[name] for row in rows]
    if label:
        label += f" {percent(mean[-1])}" if name.endswith("accuracy") else f" {mean[-1]:#.3g}"
    marker = {"marker": "o" if len(rows) == 1 else "", "markersize": 4}
    (curve,) = axes.plot(x, mean, label=label or "_", **marker | line)
    members = [finite_members(row)[name] or [np.nan] for row in rows]
    if any(len(values) > 1 for values in members):
        low, high = (list(map(end, members)) for end in (min, max))
        axes.fill_between(x, low, high, color=curve.get_color(), alpha=0.2, linewidth=0)
    return curve.get_color()


@styled
def confusion_matrix(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """The confusion matrix, (classes, classes) int: a row per true class, a column per prediction.

    Correct answers are blue, errors the redder the more frequent.
    """
    classes, size = len(counts), 10 if len(counts) <= 10 else 8
    side = WIDTH * max(1, classes / 20)  # inches: three digits of 8 points fit a cell
    figure = Figure((side, side))
    axes = figure.add_subplot()
    correct = np.eye(classes, dtype=bool)
    most = counts[~correct].max(initial=1)
    # Light colours, so that black numbers stay readable. NaN is not drawn.
    errors = np.where(correct | (counts == 0), np.nan, counts)
    axes.imshow(errors, cmap="Oranges", vmin=0, vmax=2 * most)
    axes.imshow(np.where(correct, 1.0, np.nan), cmap="Blues", vmin=0, vmax=4)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", size=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    rotation = 90 if max(map(len, class_names)) > 2 else 0
    axes.set_xticks(range(classes), class_names, rotation=rotation)
    axes.set_yticks(range(classes), class_names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure
