"""The one form every data set takes, and the check that it has that form."""

from typing import NamedTuple

import numpy as np

from mnist_jax.errors import DataError

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
