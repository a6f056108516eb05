"""Loads a data set from the first of these sources that has it.

    decoded cache → prepared tfds folder → original files in manual_dir → download

Every source but the first leaves a decoded cache for the next start; `python -m mnist_jax data`
also prepares the tfds folder.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import safetensors.numpy

from mnist_jax import atomic_io
from mnist_jax.atomic_io import user_path
from mnist_jax.data import digits, tfds_folder
from mnist_jax.data.dataset import Dataset, DataSpec, Split
from mnist_jax.data.files import is_path, load_files
from mnist_jax.data.sources import SOURCES, UnreachableError, download, parse, read_originals
from mnist_jax.errors import (
    DataError,
    DeviceError,
    UsageError,
    first_line,
    print_warnings,
    running,
    unknown_choice,
    writing,
)

__all__ = ["DATASETS", "DEFAULT_DATA_DIR", "DataSpec", "Dataset", "Split", "load_dataset"]

DEFAULT_DATA_DIR = Path("~/.cache/mnist_jax")
LOCK_TIMEOUT_S = 600  # for another process that prepares the same data set


def load_dataset(
    name: str | Path = "auto",
    *,
    data_dir: str | Path = DEFAULT_DATA_DIR,
    manual_dir: str | Path | None = None,
    **options: Any,
) -> Dataset:
    """Loads a data set. Prints nothing.

    Args:
        name: in `DATASETS`; the path of an .npz file or of a folder, see `load_files`; or "auto":
            MNIST, or scikit-learn's digits with a warning if MNIST cannot be downloaded and no copy
            of it is there. No other name is replaced.
        data_dir: folder for decoded caches, tfds folders and downloads; made when absent.
        manual_dir: folder with the four original .gz files. They are checked even if another
            source comes first. "auto" then means MNIST.
        options: keyword arguments of a data set that a fork added.

    Raises:
        UsageError: an unknown name, or a `manual_dir` for a data set that takes none.
        DataError: the data set cannot be loaded, or a copy of it is damaged.
        DeviceError: `data_dir` cannot be written.
    """
    known, name = ("auto", *DATASETS), os.fspath(name)
    name = name if name in known or name.lower() not in known else name.lower()
    if name in known:
        load = DATASETS["mnist" if name == "auto" else name]
    elif is_path(name):
        load = partial(load_files, user_path(name))
    else:
        raise unknown_choice("dataset", name, (*known, "a path"))
    takes = inspect.signature(load).parameters
    folders = {"data_dir": user_path(data_dir)} if "data_dir" in takes else {}
    if manual_dir is not None:
        if "manual_dir" not in takes:
            raise UsageError(f"{name} takes no --manual_dir; {', '.join(SOURCES)} do; leave it out")
        folders["manual_dir"] = user_path(manual_dir)
    try:
        with running(f"the data set {name!r}"):  # it may be a fork's
            found = load(**folders, **options)
        if not isinstance(found, Dataset):  # of a fork
            raise UsageError(f"the function of {name} returns a {type(found).__name__}, no Dataset")
        return found
    except UnreachableError as error:
        if name != "auto":
            raise
        warning = f"using scikit-learn's 1,797 digits instead of MNIST: {error.reason}"
        warning += "; for MNIST, pass its four files with --manual_dir=DIR"
        return replace(_load("digits", user_path(data_dir)), warnings=(warning,))


def _load(name: str, data_dir: Path, manual_dir: Path | None = None) -> Dataset:
    """Reads the decoded cache, or else another source, and writes the cache."""
    if manual_dir is not None:
        read_originals(name, manual_dir)  # an error even if the cache is there
    key = digits.VERSION if name == "digits" else SOURCES[name].key  # identifies the content
    path = data_dir / "decoded" / f"{name}-{key[:16]}.safetensors"
    source = f"cached in {data_dir}"
    if (splits := _read_cache(path)) is None:
        with _locked(data_dir, name):
            if (splits := _read_cache(path)) is None:  # unless another process has written it
                splits, source = _read_source(name, data_dir, manual_dir)
                train, test = splits
                arrays = {"train/image": train.image, "train/label": train.label}
                arrays |= {"test/image": test.image, "test/label": test.label}
                path.parent.mkdir(exist_ok=True)
                atomic_io.write_verified(path, safetensors.numpy.save(arrays))
    class_names = SOURCES.get(name, SOURCES["mnist"]).class_names
    return Dataset(name, *splits, source, (), class_names, made=splits)


@contextlib.contextmanager
def _locked(data_dir: Path, name: str) -> Iterator[None]:
    """Makes the folder; one process at a time is inside."""
    with writing(data_dir, "--data_dir"):
        data_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(data_dir / f".{name}.lock", timeout=LOCK_TIMEOUT_S):
            yield


DATASETS: dict[str, Callable[..., Dataset]] = {
    **{name: partial(_load, name) for name in SOURCES},
    "digits": lambda data_dir: _load("digits", data_dir),  # there is nothing to download
}
"""Functions that load a data set, by name. A fork's function returns `Dataset.from_arrays(…)`; it
may take data_dir, manual_dir, and options, as keyword arguments."""


def _read_cache(path: Path) -> tuple[Split, Split] | None:
    """Train and test; None if there is no file that may be read. DataError: it is damaged."""
    try:
        arrays = safetensors.numpy.load(atomic_io.read_verified(path))
    except OSError:
        return None
    except atomic_io.IntegrityError as error:
        raise DataError(f"the decoded cache is damaged: {error}; delete {path}") from error
    train, test = (Split(arrays[f"{s}/image"], arrays[f"{s}/label"]) for s in ("train", "test"))
    return train, test


def _read_source(
    name: str, data_dir: Path, manual_dir: Path | None
) -> tuple[tuple[Split, Split], str]:
    """Train and test from the first source after the cache, and its description."""
    if name == "digits":
        return digits.load(), "the digits bundled with scikit-learn"
    if (folder := tfds_folder.path(name, data_dir)).exists():
        return tfds_folder.read(folder, SOURCES[name]), f"prepared folder {folder}"
    description, originals = f"original files in {manual_dir}", manual_dir
    if originals is None:
        description = f"downloaded from {SOURCES[name].url}"
        originals = data_dir / "downloads" / name
        download(name, originals)
    return parse(read_originals(name, originals)), description


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Prepares a data set ahead of time, or checks one that is there.

    Also writes the folder that tensorflow-datasets reads, which can take half a minute.
    """

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist, digits, or the path of an .npz file or a folder to check."""

    data_dir: Path = DEFAULT_DATA_DIR
    """Folder where data sets are kept."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without a network."""

    def run(self) -> None:
        """Loads the data set, prepares its tfds folder, and prints its size and source."""
        data_dir = user_path(self.data_dir)
        loaded = load_dataset(self.dataset, data_dir=data_dir, manual_dir=self.manual_dir)
        print_warnings(loaded.warnings)
        print(loaded)
        if loaded.name not in SOURCES or loaded.sha256 is not None:
            return
        if not (folder := tfds_folder.path(loaded.name, data_dir)).exists():
            try:
                with _locked(data_dir, loaded.name):
                    tfds_folder.prepare(loaded.name, data_dir, loaded.train, loaded.test)
            # array_record does not exist for Windows; on a full disk it raises a RuntimeError.
            except (ImportError, RuntimeError, DeviceError) as error:
                print_warnings([f"{folder} is not prepared: {first_line(error)}"])
