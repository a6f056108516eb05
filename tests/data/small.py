"""A small data set in MNIST's file format, and a source table that takes it for MNIST.

Not a test: `conftest.py` uses it, and so do the processes that some tests start.
"""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from mnist_jax.data import sources
from mnist_jax.data.split import Split

# The other data sets' originals, should a test meet them, stay known to the table.
NAMES = (sources.TRAIN_IMAGES, sources.TRAIN_LABELS, sources.TEST_IMAGES, sources.TEST_LABELS)


def idx(array: np.ndarray) -> bytes:
    """`array` (uint8) as an IDX file."""
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.tobytes()


def make_split(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
    return Split(image, rng.integers(0, 10, count).astype(np.int32))


def write(folder: Path, train_count: int = 60, test_count: int = 20) -> tuple[Split, Split]:
    """Writes four files of random images to `folder`; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_split(train_count, 1), make_split(test_count, 2)
    for name, array in zip(
        NAMES, (train.image[..., 0], train.label, test.image[..., 0], test.label), strict=True
    ):
        (folder / name).write_bytes(gzip.compress(idx(array.astype(np.uint8)), mtime=0))
    return train, test


def source_of(
    folder: Path, train_count: int = 60, test_count: int = 20, url: str = "http://127.0.0.1:9/"
) -> sources.Source:
    """A table entry by which exactly the files in `folder` are the originals."""
    contents = {name: (folder / name).read_bytes() for name in NAMES}
    return sources.Source(
        url=url,
        files={
            name: sources.File(len(data), hashlib.sha256(data).hexdigest())
            for name, data in contents.items()
        },
        class_names=tuple("0123456789"),
        train_count=train_count,
        test_count=test_count,
    )
