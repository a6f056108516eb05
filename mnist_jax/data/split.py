"""The one form every data set takes, and the check that it has that form."""

from typing import NamedTuple

import numpy as np

from mnist_jax.errors import DataError, UsageError

NUM_CLASSES = 10


class Split(NamedTuple):
    """Images and their labels, in one fixed order.

    `image`: (n, 28, 28, 1) uint8 in 0..255. `label`: (n,) int32 in 0..9.
    """

    image: np.ndarray
    label: np.ndarray


def check_split(split: Split, count: int, origin: str) -> Split:
    """Returns `split` when it holds `count` well-formed examples.

    Raises:
        DataError: a shape, a dtype or a label is not as `Split` promises; names `origin`.
    """
    for field, array, shape, dtype in (
        ("images", split.image, (count, 28, 28, 1), np.uint8),
        ("labels", split.label, (count,), np.int32),
    ):
        if array.shape != shape or array.dtype != dtype:
            raise DataError(
                f"{origin}: {field} are {array.dtype}{list(array.shape)}, "
                f"expected {np.dtype(dtype)}{list(shape)}"
            )
    if count and not 0 <= split.label.min() <= split.label.max() < NUM_CLASSES:
        raise DataError(
            f"{origin}: labels run from {split.label.min()} to {split.label.max()}; "
            f"allowed are 0 to {NUM_CLASSES - 1}"
        )
    return split


def hold_out(train: Split, count: int) -> tuple[Split, Split]:
    """Takes `count` examples out of `train`: as large a share of every class as of all.

    Which ones, depends on nothing but the labels and the count: two recipes, or two seeds, are
    compared on the same images.

    Returns:
        The rest, and those taken out, each in the order of `train`.

    Raises:
        UsageError: `count` is not less than the number of examples.
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
        # Evenly spaced from 0 to 1, in random order: any part of that range has its share of all
        # classes, to within one example.
        place[members] = (rng.permutation(len(members)) + rng.uniform()) / len(members)
    held_out = np.zeros(size, bool)
    held_out[np.argsort(place, kind="stable")[:count]] = True
    return (
        Split(train.image[~held_out], train.label[~held_out]),
        Split(train.image[held_out], train.label[held_out]),
    )
