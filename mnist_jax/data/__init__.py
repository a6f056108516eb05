"""Loads a data set from the first of these sources that has it.

    decoded cache → prepared tfds folder → original files in manual_dir → download

Every source but the first leaves a decoded cache for the next start.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from mnist_jax.atomic_io import IntegrityError, exists, user_path
from mnist_jax.data import cache, digits, tfds_folder
from mnist_jax.data.sources import SOURCES, UnreachableError, download, parse, read_originals
from mnist_jax.data.split import Split, hold_out
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

    name: str
    """The data set that was loaded, never "auto": one of `DATASETS`."""
    train: Split
    test: Split
    source: str
    """Where the arrays came from, in a few words."""
    warnings: tuple[str, ...]
    """What the user should know: a substitution, a damaged file, a folder that is not used."""
    class_names: tuple[str, ...]
    validation: Split | None = None
    """Training images held out by `hold_out`; `train` does not contain them."""

    def hold_out(self, count: int) -> "Dataset":
        """Returns the data set with `count` training images moved to `validation`."""
        train, validation = hold_out(self.train, count)
        return replace(self, train=train, validation=validation)

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
        DataError: the data set cannot be loaded, or a file in `manual_dir` is not the original.
    """
    known = ("auto", *SOURCES, "digits")
    if name not in known:
        raise unknown_choice("dataset", name, known)
    data_dir = user_path(data_dir)
    if manual_dir is not None:
        if name == "digits":
            raise UsageError(f"digits take no --manual_dir; {', '.join(SOURCES)} do; leave it out")
        manual_dir = user_path(manual_dir)
    try:
        return _load("mnist" if name == "auto" else name, data_dir, manual_dir)
    except UnreachableError as error:
        if name != "auto":
            raise DataError(
                f"{error}; download the four files by hand and pass --manual_dir=DIR, "
                "or use --dataset=digits"
            ) from error
        warning = f"using scikit-learn's 1,797 digits instead of MNIST: {error}"
        dataset = _load("digits", data_dir, None)
        return replace(dataset, warnings=(warning, *dataset.warnings))


def _load(name: str, data_dir: Path, manual_dir: Path | None) -> Dataset:
    """Reads the decoded cache, or else another source, and writes the cache."""
    if manual_dir is not None:
        read_originals(name, manual_dir)  # an error even if the cache is there
    path = cache.file_of(name, data_dir, SOURCES[name].key if name in SOURCES else digits.VERSION)
    warnings: list[str] = []
    if found := _read_cache(name, path, warnings):
        return found
    with cache.lock(data_dir, name):
        warnings.clear()
        if found := _read_cache(name, path, warnings):  # another process wrote it
            return found
        try:
            source, (train, test) = _read_source(name, data_dir, manual_dir, warnings)
        except DataError as error:
            if not warnings:
                raise
            # There is a copy, though unusable, so "auto" must not replace MNIST.
            raise DataError("; ".join((*warnings, str(error)))) from error
        cache.write(path, train, test)
    return Dataset(name, train, test, source, tuple(warnings), class_names(name))


def _read_cache(name: str, path: Path, warnings: list[str]) -> Dataset | None:
    try:
        train, test = cache.read(path)
    except OSError:
        return None
    except IntegrityError as error:
        warnings.append(f"the decoded cache is damaged and not used: {error}")
        return None
    return Dataset(name, train, test, f"decoded cache {path}", (), class_names(name))


def _read_source(
    name: str, data_dir: Path, manual_dir: Path | None, warnings: list[str]
) -> tuple[str, tuple[Split, Split]]:
    """Reads the first source after the cache; returns its description, and train and test."""
    if name == "digits":
        return "the digits bundled with scikit-learn", digits.load()
    source, folder = SOURCES[name], tfds_folder.folder_of(name, data_dir)
    if found := exists(folder):
        try:
            return f"prepared folder {folder}", tfds_folder.read(folder, source)
        except (DataError, ImportError) as error:
            warnings.append(f"{folder} is not used: {error}")
    if manual_dir is not None:
        description, originals = f"original files in {manual_dir}", manual_dir
    else:
        description, originals = f"downloaded from {source.url}", data_dir / "downloads" / name
        download(name, originals)
    train, test = parse(name, read_originals(name, originals))
    if not found:
        try:
            tfds_folder.prepare(name, data_dir, train, test)
        except ImportError as error:
            warnings.append(f"{folder} is not prepared: {error}; the original files were read")
    return description, (train, test)


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
