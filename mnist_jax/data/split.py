"""The arrays of a data set, and the validation images held out of them."""

from typing import NamedTuple

import numpy as np

from mnist_jax.errors import DataError, UsageError

NUM_CLASSES = 10


class Split(NamedTuple):
    """Images and their labels, in a fixed order."""

    image: np.ndarray  # (n, 28, 28, 1) uint8 in 0..255
    label: np.ndarray  # (n,) int32 in 0..9


def check_split(split: Split, count: int, origin: str) -> Split:
    """Returns `split` if it holds `count` examples as `Split` documents them.

    Raises:
        DataError: a shape or a label is not allowed; names `origin`.
    """
    image, label = split
    if (image.shape, label.shape) != ((count, 28, 28, 1), (count,)):
        raise DataError(
            f"{origin} has images {image.shape} and labels {label.shape}; expected are {count} of "
            "(28, 28, 1) and as many labels"
        )
    if not 0 <= label.min() <= label.max() < NUM_CLASSES:
        raise DataError(
            f"{origin} has labels {label.min()} to {label.max()}; allowed is 0 to {NUM_CLASSES - 1}"
        )
    return split


def hold_out(train: Split, count: int) -> tuple[Split, Split]:
    """Takes `count` examples out of `train`, the same share of every class.

    The choice depends on the labels and the count alone, so that runs with other flags or another
    seed are compared on the same images.

    Returns:
        The remaining and the held-out examples, each in the order of `train`.

    Raises:
        UsageError: `count` is not from 1 to one less than the number of examples.
    """
    size = len(train.label)
    if not 0 < count < size:
        raise UsageError(
            f"validation is {count}; allowed is 0 to {size - 1}, less than the {size} training "
            "images; change --validation"
        )
    rng = np.random.default_rng(0)
    place = np.empty(size)
    for label in np.unique(train.label):
        members = np.flatnonzero(train.label == label)
        # Evenly spaced in [0, 1), in random order, so the first `count` places of all classes
        # hold an equal share of each, to within one example.
        place[members] = (rng.permutation(len(members)) + rng.uniform()) / len(members)
    held_out = np.zeros(size, bool)
    held_out[np.argsort(place, kind="stable")[:count]] = True
    return (
        Split(train.image[~held_out], train.label[~held_out]),
        Split(train.image[held_out], train.label[held_out]),
    )
