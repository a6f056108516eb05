"""Several trained models on the same test images: their vote, and how two of them compare."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_jax.data import Dataset
from mnist_jax.inference.restore import Classifier, LoadedRun, finite_members, none_left
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs.statistics import accuracy, calibration_error, mcnemar, summarize, welch

SIGNIFICANT = 0.05


class Predictions(NamedTuple):
    """What the members of some runs say of the test images.

    Attributes:
        probabilities: (members, images, classes) float32.
        label: (images,) int32.
        notices: members that were left out, and why.
    """

    probabilities: np.ndarray
    label: np.ndarray
    notices: list[str]

    @property
    def right(self) -> np.ndarray:
        """(members, images) bool: whose most probable class is the label."""
        return self.probabilities.argmax(2) == self.label


def predict_all(
    runs: Sequence[LoadedRun], dataset: Dataset, *, platform: str | None = None, shift: int = 0
) -> Predictions:
    """The probabilities that every member of every run gives the test images.

    A member whose probabilities are not finite is left out, with a notice.

    Args:
        runs: the runs.
        dataset: theirs.
        platform: the device that evaluates; None for each run's own.
        shift: as in `Classifier`.

    Raises:
        DeviceError: the platform is absent.
        NonFiniteError: no member is left.
    """
    found, notices = [], []
    for run in runs:
        with devices.running_on(platform or run.config.platform, run.config.precision) as device:
            members = Classifier(run, device, shift=shift)(dataset.test.image)
        finite, left_out = finite_members(run, members)
        found.extend(finite.values())
        notices.extend(left_out)
    if not found:
        raise none_left(notices)
    return Predictions(np.stack(found), dataset.test.label, notices)


def vote(predictions: Predictions) -> dict[str, Any]:
    """All members together: none is chosen, and none is left out for its accuracy.

    Returns:
        single: the statistics of the members' own accuracies. averaged: of the class with the
        highest mean probability. majority: of the class that most members name; of classes named
        equally often, the more probable. calibration_error: of the mean probabilities.
        missed_by_all: the test images that no member gets right, by their place.
    """
    probabilities, label = predictions.probabilities, predictions.label
    mean = probabilities.mean(0)
    classes = mean.shape[1]
    votes = np.apply_along_axis(np.bincount, 0, probabilities.argmax(2), minlength=classes).T
    return {
        "members": len(probabilities),
        "single": summarize(predictions.right.mean(1).tolist()),
        "averaged": accuracy(mean.argmax(1), label),
        "majority": accuracy((votes + mean / 2).argmax(1), label),
        "calibration_error": calibration_error(mean, label),
        "missed_by_all": np.flatnonzero(~predictions.right.any(0)).tolist(),
    }


def compare(a: Predictions, b: Predictions) -> dict[str, Any]:
    """The second's accuracy less the first's, and whether chance explains it.

    Returns:
        members: how many networks each side has. images: McNemar's test on the images, of the mean
        probabilities of each side's members. seeds: Welch's t-test of the members' accuracies, with
        a 95 % interval of the difference; None where a side has one member. better and worse:
        whether the second is significantly so, by the seeds where there are any, else by the
        images.
    """
    right_a, right_b = (side.probabilities.mean(0).argmax(1) == side.label for side in (a, b))
    images = {"difference": float(right_b.mean() - right_a.mean()), **mcnemar(right_a, right_b)}
    seeds = None
    if min(len(a.probabilities), len(b.probabilities)) > 1:
        seeds = welch(a.right.mean(1), b.right.mean(1))
    verdict = images if seeds is None else seeds
    significant = verdict["p"] < SIGNIFICANT
    better, worse = (significant and sign * verdict["difference"] > 0 for sign in (1, -1))
    members = len(a.probabilities), len(b.probabilities)
    return {"members": members, "images": images, "seeds": seeds, "better": better, "worse": worse}
