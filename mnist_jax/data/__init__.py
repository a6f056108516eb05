"""Loads a data set from the first of these sources that has it.

    decoded cache → prepared tfds folder → original files in manual_dir → download

Every source but the first leaves a decoded cache for the next start.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mnist_jax.atomic_io import user_path
from mnist_jax.data import cache, digits, tfds_folder
from mnist_jax.data.sources import SOURCES, UnreachableError, download, parse, read_originals
from mnist_jax.data.split import Split
from mnist_jax.errors import DataError, UsageError, unknown_choice

__all__ = ["DATASETS", "DEFAULT_DATA_DIR", "Dataset", "Split", "class_names", "load_dataset"]

DATASETS = (*SOURCES, "digits")
"""Names of the data sets. `load_dataset` also takes "auto"."""

DEFAULT_DATA_DIR = Path("~/.cache/mnist_jax")


def class_names(name: str) -> tuple[str, ...]:
    """Class names of a data set, by label; "auto" and "digits" have those of MNIST."""
    return SOURCES[name if name in SOURCES else "mnist"].class_names


@dataclass(frozen=True)
class Dataset:
    """Training and test images, and where they came from."""

    name: str  # one of `DATASETS`, never "auto"
    train: Split
    test: Split
    source: str  # where the arrays came from, in a few words
    warnings: tuple[str, ...]  # what the user should know, such as a substitution
    class_names: tuple[str, ...]
    validation: Split | None = None  # held out of `train`

    def eval_splits(self) -> dict[str, Split]:
        """The splits a run is evaluated on, by name."""
        held_out = {} if self.validation is None else {"validation": self.validation}
        return {**held_out, "test": self.test}


def load_dataset(
    name: str = "auto",
    *,
    data_dir: str | Path = DEFAULT_DATA_DIR,
    manual_dir: str | Path | None = None,
) -> Dataset:
    """Loads a data set. Prints nothing.

    Args:
        name: one of `DATASETS`, or "auto": MNIST, or scikit-learn's digits with a warning if
            MNIST cannot be downloaded and no copy of it is there. No other name is replaced.
        data_dir: folder for decoded caches, tfds folders and downloads; made when absent.
        manual_dir: folder with the four original .gz files. They are checked even if another
            source comes first. "auto" then means MNIST.

    Raises:
        UsageError: an unknown name, or a `manual_dir` for the digits.
        DataError: the data set cannot be loaded, or a copy of it is damaged.
    """
    if name not in ("auto", *DATASETS):
        raise unknown_choice("dataset", name, ("auto", *DATASETS))
    if manual_dir is not None and name == "digits":
        raise UsageError(f"digits take no --manual_dir; {', '.join(SOURCES)} do; leave it out")
    data_dir, manual_dir = user_path(data_dir), user_path(manual_dir) if manual_dir else None
    try:
        return _load("mnist" if name == "auto" else name, data_dir, manual_dir)
    except UnreachableError as error:
        if name != "auto":
            raise DataError(
                f"{error}; download the four files by hand and pass --manual_dir=DIR, "
                "or use --dataset=digits"
            ) from error
        warning = f"using scikit-learn's 1,797 digits instead of MNIST: {error}"
        return replace(_load("digits", data_dir, None), warnings=(warning,))


def _load(name: str, data_dir: Path, manual_dir: Path | None) -> Dataset:
    """Reads the decoded cache, or else another source, and writes the cache."""
    if manual_dir is not None:
        read_originals(name, manual_dir)  # an error even if the cache is there
    path = cache.file_of(name, data_dir, SOURCES[name].key if name in SOURCES else digits.VERSION)
    if (splits := cache.read(path)) is None:
        with cache.lock(data_dir, name):
            if (splits := cache.read(path)) is None:  # unless another process has written it
                dataset = _read_source(name, data_dir, manual_dir)
                cache.write(path, dataset.train, dataset.test)
                return dataset
    return Dataset(name, *splits, f"decoded cache {path}", (), class_names(name))


def _read_source(name: str, data_dir: Path, manual_dir: Path | None) -> Dataset:
    """Reads the first source after the cache."""
    warnings = ()
    if name == "digits":
        description, splits = "the digits bundled with scikit-learn", digits.load()
    elif (folder := tfds_folder.folder_of(name, data_dir)).exists():
        description, splits = f"prepared folder {folder}", tfds_folder.read(folder, SOURCES[name])
    else:
        description, originals = f"original files in {manual_dir}", manual_dir
        if originals is None:
            originals = data_dir / "downloads" / name
            description = f"downloaded from {SOURCES[name].url}"
            download(name, originals)
        splits = parse(read_originals(name, originals))
        try:
            tfds_folder.prepare(name, data_dir, *splits)
        except ImportError as error:  # array_record does not exist for Windows
            warnings = (f"{folder} is not prepared: {error}; the original files were read",)
    return Dataset(name, *splits, description, warnings, class_names(name))


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Prepares a data set ahead of time, or checks one that is there."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist or digits."""

    data_dir: Path = DEFAULT_DATA_DIR
    """Folder where data sets are kept."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def run(self) -> None:
        """Loads the data set and prints its size and source."""
        loaded = load_dataset(self.dataset, data_dir=self.data_dir, manual_dir=self.manual_dir)
        for warning in loaded.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        train, test = len(loaded.train.label), len(loaded.test.label)
        print(f"{loaded.name}: {train:,} train and {test:,} test images, {loaded.source}")
