"""What numbers from several trainings, or from a finite test set, can be said to show."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # of which scipy.special, a tenth of a second, is imported when it is first used


def percent(share: float | None, sign: str = " %") -> str:
    """A share of 1 as a text, to a hundredth of a percent; of None a hyphen."""
    return "-" if share is None else f"{100 * share:.2f}{sign}"


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """What the values of several seeds say of a recipe.

    Returns:
        n, mean, sd (the sample's standard deviation), ci95 (Student's 95 % interval of the mean),
        best and worst. With one value sd and ci95 are None, without any all but n.
    """
    n = len(values)
    if n == 0:
        return {"n": 0, **dict.fromkeys(("mean", "sd", "ci95", "best", "worst"))}
    mean, sd, ci95 = float(np.mean(values)), None, None
    if n > 1:
        sd = float(np.std(values, ddof=1))
        half = float(scipy.special.stdtrit(n - 1, 0.975)) * sd / n**0.5
        ci95 = [mean - half, mean + half]
    best, worst = float(np.max(values)), float(np.min(values))
    return {"n": n, "mean": mean, "sd": sd, "ci95": ci95, "best": best, "worst": worst}


def accuracy(predicted: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """How many images are right: correct, count, accuracy, and its ci95 (see `binomial_ci95`).

    Args:
        predicted: (images,) int, a class for each.
        label: (images,) int, its true one.
    """
    correct, count = int(np.sum(predicted == label)), len(label)
    interval = binomial_ci95(correct, count)
    return {"correct": correct, "count": count, "accuracy": correct / count, "ci95": interval}


def binomial_ci95(correct: float, count: float) -> list[float]:
    """The 95 % interval of an accuracy that came of `count` images (Wilson, 1927).

    It is of the accuracy on all such images, of which these are a sample; another seed's varies
    besides.
    """
    z2 = float(scipy.special.ndtri(0.975)) ** 2
    middle = (correct + z2 / 2) / (count + z2)
    half = (z2 * (correct * (count - correct) / count + z2 / 4)) ** 0.5 / (count + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, Any]:
    """Whether two models differ on the same images: McNemar's exact test (McNemar, 1947).

    Only images that one of them alone gets right count; without a difference each is as likely to
    be either's.

    Args:
        right_a: (images,) bool, whether the first is right.
        right_b: the same of the second.

    Returns:
        only_a and only_b, the counts of those images, and p, the two-sided probability of a
        difference as large by chance.
    """
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(~right_a & right_b))
    p = min(1.0, 2 * float(scipy.special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
    return {"only_a": only_a, "only_b": only_b, "p": p}


def welch(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Whether the mean of `b` differs from that of `a`: Welch's t-test (Welch, 1947).

    Args:
        a: (n,), two or more values that do not depend on each other, such as accuracies of seeds.
        b: (m,), the same.

    Returns:
        difference (of b's mean less a's), its ci95, and p, two-sided.
    """
    difference = float(b.mean() - a.mean())
    parts = [side.var(ddof=1) / len(side) for side in (a, b)]  # of the variance of the difference
    error = sum(parts) ** 0.5
    if error == 0:  # nothing varies, so nothing is left to chance
        return {"difference": difference, "ci95": [difference] * 2, "p": float(difference == 0)}
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True)
    )
    half = float(scipy.special.stdtrit(freedom, 0.975)) * error
    p = 2 * float(scipy.special.stdtr(freedom, -abs(difference) / error))
    return {"difference": difference, "ci95": [difference - half, difference + half], "p": p}


def confusion(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """How often each class was taken for which.

    Args:
        predicted: (..., images) int, the answers of one model or of several.
        label: (images,) int.
        classes: how many there are.

    Returns:
        (classes, classes) int, a row for each label and a column for each answer.
    """
    pairs = np.broadcast_to(label, predicted.shape) * classes + predicted
    return np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)


def most_confident_errors(probabilities: np.ndarray, label: np.ndarray, most: int) -> np.ndarray:
    """Where the most probable class is wrong, the most probable first.

    Args:
        probabilities: (images, classes).
        label: (images,) int.
        most: how many to name.

    Returns:
        (most or fewer,) int, the images' places; of equals the first comes first.
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != label)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")[:most]]


class CalibrationBins(NamedTuple):
    """Images by the probability of their most probable class, in bins of equal width.

    Attributes:
        images: (bins,) int, how many are in each.
        correct: (bins,) int, for how many of them that class is right.
        confidence: (bins,) float64, the sum of those probabilities.
    """

    images: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., 2017): mean |accuracy - confidence|."""
        return float(np.abs(self.correct - self.confidence).sum() / self.images.sum())


def calibration_bins(
    probabilities: np.ndarray, label: np.ndarray, bins: int = 15
) -> CalibrationBins:
    """Sorts answers into so many bins.

    Args:
        probabilities: (..., images, classes), of one model or of several.
        label: (images,) int.
        bins: how many.
    """
    confidence, right = probabilities.max(-1).ravel(), (probabilities.argmax(-1) == label).ravel()
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return CalibrationBins(
        np.bincount(place, minlength=bins),
        np.bincount(place[right], minlength=bins),
        np.bincount(place, confidence, bins),
    )


def calibration_error(probabilities: np.ndarray, label: np.ndarray) -> float:
    """The expected calibration error of `calibration_bins`."""
    return calibration_bins(probabilities, label).error
