"""A data set from the user's own files: an .npz file, or a folder of four IDX files."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from mnist_jax.data.dataset import Dataset
from mnist_jax.data.sources import read_idx
from mnist_jax.errors import DataError

NAMES = ("x_train", "y_train", "x_test", "y_test")


def is_path(name: str) -> bool:
    """Whether a data set's name is the path of files."""
    return "/" in name or name.endswith(".npz") or os.path.isdir(name)


def load_files(path: Path) -> Dataset:
    """Reads `x_train, y_train, x_test, y_test` from an .npz file, or four IDX files in a folder.

    The names of the IDX files end in images-idx3-ubyte or labels-idx1-ubyte, with or without .gz;
    those of the test files contain "test" or "t10k". Pickled objects are never loaded.

    Raises DataError if the path holds no such data.
    """
    try:
        x_train, y_train, x_test, y_test = _read_folder(path) if path.is_dir() else _read_npz(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    name = path.name.removesuffix(".npz")
    dataset = Dataset.from_arrays(name, x_train, y_train, x_test, y_test)
    return dataclasses.replace(dataset, source=str(path))


def _read_npz(path: Path) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in NAMES if name not in file]:
                have = ", ".join(file) or "nothing"
                raise DataError(f"{path} has no {', '.join(missing)}; it has {have}")
            return [file[name] for name in NAMES]
    except (DataError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, its decoders and NumPy each raise their own
        raise DataError(f"{path} is not an .npz file of plain arrays") from error


def _read_folder(folder: Path) -> list[np.ndarray]:
    arrays = []
    for is_test in (False, True):
        for ending in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            found = {  # a file and its .gz, as torchvision leaves them, are one
                file.name.removesuffix(".gz"): file
                for file in sorted(folder.iterdir())
                if file.name.removesuffix(".gz").endswith(ending)
                and bool(re.search(r"(?<![a-z])(test|t10k)", file.name)) == is_test
            }
            if len(found) != 1:
                part = f"{'test' if is_test else 'train'}…{ending}[.gz]"
                raise DataError(f"{folder} has {len(found)} files named {part}; one is needed")
            (file,) = found.values()
            arrays.append(read_idx(file.name, file.read_bytes()))
    return arrays
