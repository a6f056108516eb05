"""What can be shown of runs: each figure with the words that go with it."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mnist_jax.data import Dataset
from mnist_jax.data.split import NUM_CLASSES
from mnist_jax.inference.compare import Predictions
from mnist_jax.inference.restore import LoadedRun
from mnist_jax.metrics import mean_over_members
from mnist_jax.models import layers
from mnist_jax.reporting import plots
from mnist_jax.runs.statistics import calibration_bins, confusion, most_confident_errors, percent

ERRORS = 24  # wrong answers shown
UNITS = 32  # of a hidden layer
FILTERS = 64


class Picture(NamedTuple):
    """A figure with a heading, a text to stand below it and one for who cannot see it.

    `name` is a short word for a file.
    """

    name: str
    figure: Figure
    heading: str
    text: str
    alt: str

    @property
    def uris(self) -> dict[str, str]:
        """The figure itself as two addresses: for a light page, and for a dark one."""
        light = plots.svg(self.figure)
        return {
            page: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
            for page, svg in (("light", light), ("dark", plots.darkened(light)))
        }

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches()
        return round(96 * width), round(96 * height)


def of_one(run: LoadedRun, dataset: Dataset, predictions: Predictions) -> Iterator[Picture]:
    """What can be shown of a run whose members gave the test images these probabilities."""
    names, probabilities, label = dataset.class_names, predictions.probabilities, predictions.label
    if run.progress.rows:
        yield _curves({run.config.model: run.progress.rows})
    networks = len(probabilities)
    together = "" if networks == 1 else f" The answers of all {networks} networks are counted."
    yield _confusion(confusion(probabilities.argmax(2), label, NUM_CLASSES), names, together)
    mean = probabilities.mean(0)
    places = most_confident_errors(mean, label, ERRORS)
    if len(places):
        wrong = dataset.test.image[places], label[places], mean[places]
        yield _errors(*wrong, names, "" if networks == 1 else f", the mean of all {networks}")
    if (weights := _weights(run, names)) is not None:
        yield weights
    bins = calibration_bins(probabilities, label)
    yield Picture(
        "reliability",
        plots.reliability(bins, networks),
        "Can its probabilities be believed?",
        "Answers sorted by their probability. On the dashed line a network is right as often as it "
        "says; below it, it is too sure. Vertical lines are 95 % intervals. The calibration error "
        "is the mean distance from the dashed line, by images. Below: how many there are, a bar of "
        f"ten times as many a step higher.{together}",
        f"Reliability diagram; the calibration error is {percent(bins.error)}.",
    )


def of_several(rows: Mapping[str, plots.Rows]) -> Iterator[Picture]:
    """What can be shown of runs side by side: of their lines of metrics.jsonl, by their names."""
    begun = {name: run for name, run in rows.items() if run}
    if begun:
        ends = [f"{name} {percent(_accuracy(run, -1))}" for name, run in begun.items()]
        yield _curves(begun)
        yield Picture(
            "time",
            plots.accuracy_against_time(begun),
            "What the accuracy costs",
            "A point an epoch, over the seconds that training had taken by then; compiling and "
            "evaluating are left out. Each step to the right is ten times the time.",
            f"Test accuracy against time of training, ending at {', '.join(ends)}.",
        )


def _curves(runs: Mapping[str, plots.Rows]) -> Picture:
    ends = [
        f"{name} from {percent(_accuracy(rows, 0))} to {percent(_accuracy(rows, -1))} "
        f"in {len(rows)} epochs"
        for name, rows in runs.items()
    ]
    members = any(isinstance(rows[0]["test/loss"], list) for rows in runs.values())
    shaded = " The shaded range is from the least of the networks to the greatest."
    return Picture(
        "curves",
        plots.learning_curves(runs),
        "Learning curves",
        "Train is measured during an epoch, with dropout if there is any, and test after it. A gap "
        f"that widens is what a network has learned by heart.{shaded if members else ''}",
        f"Loss and accuracy by epoch. Test accuracy: {'; '.join(ends)}.",
    )


def _accuracy(rows: plots.Rows, place: int) -> float:
    return mean_over_members(rows[place], "test/accuracy")


def _confusion(counts: np.ndarray, names: Sequence[str], together: str) -> Picture:
    errors = counts * (1 - np.eye(len(counts), dtype=int))
    true, answer = divmod(int(errors.argmax()), len(counts))
    most = f"{names[true]} was taken for {names[answer]} most often, {errors.max():,} times"
    return Picture(
        "confusion",
        plots.confusion(counts, names),
        "What was taken for what",
        "A row for each label, a column for each answer: on the diagonal stand right answers, "
        f"beside it errors.{together}",
        f"Labels against answers: {errors.sum():,} errors{f'; {most}' if errors.any() else ''}.",
    )


def _errors(
    image: np.ndarray, label: np.ndarray, mean: np.ndarray, names: Sequence[str], of_whom: str
) -> Picture:
    shown = [
        f"{names[true]} taken for {names[row.argmax()]} ({percent(row.max())})"
        for true, row in zip(label[:5], mean, strict=False)
    ]
    return Picture(
        "errors",
        plots.worst_errors(image, label, mean, names),
        "Wrong and sure of it",
        f"Test images with a wrong answer: label → answer, and its probability{of_whom}. The "
        "surest come first.",
        f"The {len(label)} surest errors, first {', '.join(shown)}.",
    )


def first_layer(run: LoadedRun) -> tuple[str, int, np.ndarray] | None:
    """The first layer that has parameters, its weights as images.

    Returns:
        Its name, the seed of the network (of an ensemble, the first that is finite) and
        (units, height, width) float32, an image for each unit; None where it does not look at
        pixels.
    """
    name = next((layer.name for layer in layers(run.model) if layer.parameters), None)
    if name is None:  # parameters of no layer
        return None
    for seed, params in zip(run.config.all_seeds(), run.members, strict=True):
        kernel = np.asarray(params[name].get("kernel", 0.0))
        if not np.all(np.isfinite(kernel)):
            continue
        if kernel.ndim == 4 and kernel.shape[2] == 1:  # (height, width, 1, units)
            return name, seed, np.moveaxis(kernel[:, :, 0], 2, 0)
        if kernel.ndim == 2 and len(kernel) == 28 * 28:  # (pixels, units)
            return name, seed, kernel.T.reshape(-1, 28, 28)
    return None


def _weights(run: LoadedRun, names: Sequence[str]) -> Picture | None:
    """The picture of `first_layer`: of each class, or of as many hidden units as can be seen."""
    if (found := first_layer(run)) is None:
        return None
    layer, seed, tiles = found
    units, height, width = tiles.shape
    if layer == "logits":
        figure, what = plots.weights(tiles, names, columns=5), "The weight of each pixel by class"
    else:
        most = UNITS if height * width == 28 * 28 else FILTERS
        figure = plots.weights(tiles[:most])
        of = f" of {units}" if units > most else ""
        what = f"Weights of {min(units, most)}{of} units of {layer}, {height}×{width} pixels each"
    whose = "" if run.config.seeds is None else f", of seed {seed}"
    return Picture(
        "weights",
        figure,
        "What the first layer looks for",
        f"{what}{whose}. Blue: ink there speaks for it; red: against it. The strongest 0.5 % go "
        "beyond the scale.",
        f"{what}.",
    )
