"""The arrays of a data set, and the validation images held out of them."""

from typing import NamedTuple

import numpy as np

from mnist_jax.errors import UsageError

NUM_CLASSES = 10


class Split(NamedTuple):
    """Images and their labels, in a fixed order."""

    image: np.ndarray  # (n, 28, 28, 1) uint8 in 0..255
    label: np.ndarray  # (n,) int32 in 0..9

    def take(self, index: slice | np.ndarray) -> "Split":
        """Those examples that a slice or a mask selects."""
        return Split(self.image[index], self.label[index])


def hold_out(train: Split, count: int) -> tuple[Split, Split]:
    """Takes `count` examples out of `train`, the same share of every class.

    The choice depends on the labels and the count alone, so that runs with other flags or another
    seed are compared on the same images. Returns the remaining and the held-out examples, each in
    the order of `train`.

    Raises:
        UsageError: `count` is not from 1 to one less than the number of examples.
    """
    size = len(train.label)
    if not 0 < count < size:
        raise UsageError(f"validation is {count}; allowed is 0 to {size - 1}; change --validation")
    rng = np.random.default_rng(0)
    place = np.empty(size)
    for label in np.unique(train.label):
        members = np.flatnonzero(train.label == label)
        # Evenly spaced in [0, 1), in random order, so the first `count` places of all classes
        # hold an equal share of each, to within one example.
        place[members] = (rng.permutation(len(members)) + rng.uniform()) / len(members)
    held_out = np.zeros(size, bool)
    held_out[np.argsort(place, kind="stable")[:count]] = True
    return train.take(~held_out), train.take(held_out)
