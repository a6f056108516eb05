"""A small data set in the file format of MNIST, and a source table entry for it."""

import gzip
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mnist_jax.data import sources
from mnist_jax.data.dataset import Split

NAMES = tuple(sources.SOURCES["mnist"].files)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.tobytes()


def make_split(count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
    return Split(image, rng.integers(0, 10, count).astype(np.int32))


def write_idx(folder: Path, arrays: Sequence, start: str = "", ending: str = ".gz") -> list[Path]:
    """Writes the four files, whose names start and end so, to `folder`; no ending, no gzip."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{start}{name.removesuffix('.gz')}{ending}" for name in NAMES]
    for file, array in zip(files, arrays, strict=True):
        data = idx(array.astype(np.uint8))
        file.write_bytes(gzip.compress(data, mtime=0) if ending else data)
    return files


def write(folder: Path, seed: int = 1) -> tuple[Split, Split]:
    """Writes four files of random images to `folder`; returns their content."""
    train, test = make_split(60, seed), make_split(20, seed + 1)
    write_idx(folder, (train.image[..., 0], train.label, test.image[..., 0], test.label))
    return train, test


def source_of(folder: Path) -> sources.Source:
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    return sources.Source("http://127.0.0.1:9/", files, class_names=tuple("0123456789"))
