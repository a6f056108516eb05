"""Data sets as NumPy arrays: `load_dataset` and the two types it returns.

    decoded cache → prepared tfds folder → original files in manual_dir → download

The first of these that has the data set supplies it, and all but the first leave the decoded
cache behind, so the next start takes a fraction of a second. `Dataset.source` says which it was.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mnist_jax import atomic_io as storage
from mnist_jax.data import builders, cache, digits
from mnist_jax.data.sources import SOURCES, parse, read_originals
from mnist_jax.data.split import Split, hold_out
from mnist_jax.errors import DataError, UsageError, unknown_choice

__all__ = ["DATASETS", "DEFAULT_DATA_DIR", "Dataset", "Split", "class_names", "load_dataset"]

DATASETS = (*SOURCES, "digits")
"""The data sets there are. `load_dataset` takes "auto" as well."""

DEFAULT_DATA_DIR = Path("~/.cache/mnist_jax")


def class_names(name: str) -> tuple[str, ...]:
    """The names of a data set's classes, by label; "auto" has MNIST's."""
    return SOURCES[name if name in SOURCES else "mnist"].class_names


@dataclass(frozen=True)
class Dataset:
    """A data set, and how it was come by."""

    name: str
    """What was loaded, never "auto": one of `DATASETS`."""
    train: Split
    test: Split
    source: str
    """Where the arrays came from, in a few words for the run's summary."""
    warnings: tuple[str, ...]
    """What the user must be told: a substitution, a repair, something left undone."""
    class_names: tuple[str, ...]
    """Ten names, by label."""
    validation: Split | None = None
    """Training images held out by `hold_out`; `train` is without them."""

    def hold_out(self, count: int) -> "Dataset":
        """The same with so many of the training images as `validation`."""
        train, validation = hold_out(self.train, count)
        return replace(self, train=train, validation=validation)

    def eval_splits(self) -> dict[str, Split]:
        """What a run is evaluated on, by name."""
        held_out = {} if self.validation is None else {"validation": self.validation}
        return {**held_out, "test": self.test}


def load_dataset(
    name: str = "auto",
    *,
    data_dir: str | Path = DEFAULT_DATA_DIR,
    manual_dir: str | Path | None = None,
) -> Dataset:
    """Loads a data set; prints nothing.

    Args:
        name: one of `DATASETS`, or "auto": MNIST where it can be had, otherwise scikit-learn's
            digits, with a notice that says so. No other name is ever replaced.
        data_dir: the folder for decoded caches and tfds's folders; made when absent. Where it
            cannot be written, data that needs no download is loaded all the same, uncached, with
            a notice.
        manual_dir: a folder with the four original .gz files. Given, it is checked even if
            another source comes first, and a bad one is an error; "auto" then means MNIST.

    Raises:
        UsageError: an unknown name, or a `manual_dir` for the digits, which need none.
        DataError: the data set cannot be had, or a file of `manual_dir` is not the original.
    """
    data_dir = storage.user_path(data_dir)
    if name not in ("auto", *DATASETS):
        raise unknown_choice("dataset", name, ("auto", *DATASETS))
    if manual_dir is not None:
        if name == "digits":
            raise UsageError(
                "--manual_dir goes with the data sets "
                f"{', '.join(SOURCES)}; digits ships with scikit-learn; leave --manual_dir out"
            )
        return _load_idx("mnist" if name == "auto" else name, data_dir, Path(manual_dir))
    if name == "digits":
        return _load_digits(data_dir)
    if name != "auto":
        return _load_idx(name, data_dir, None)
    try:
        return _load_idx("mnist", data_dir, None)
    except DataError as error:
        dataset = _load_digits(data_dir)
        notice = f"using the 1,797 digits of scikit-learn instead of MNIST: {error}"
        return replace(dataset, warnings=(notice, *dataset.warnings))


def _load_digits(data_dir: Path) -> Dataset:
    def make(unwritable: OSError | None, notices: list[str]) -> tuple[Split, Split, str]:
        return *digits.load(), "the digits bundled with scikit-learn"

    counts = (digits.TRAIN_COUNT, digits.TEST_COUNT)
    return _load_cached("digits", digits.VERSION, counts, data_dir, make)


def _load_idx(name: str, data_dir: Path, manual_dir: Path | None) -> Dataset:
    source = SOURCES[name]
    originals = None
    if manual_dir is not None:
        manual_dir = storage.user_path(manual_dir)
        if not storage.is_folder(manual_dir):
            raise DataError(
                f"--manual_dir={manual_dir} is not a folder; name the one that holds "
                f"{', '.join(source.files)}"
            )
        originals = read_originals(name, {file: manual_dir / file for file in source.files})

    def make(unwritable: OSError | None, notices: list[str]) -> tuple[Split, Split, str]:
        folder = builders.prepared_folder(name, data_dir)
        if builders.prepared_info(folder).get("fileFormat") == "array_record":
            try:
                return *builders.read(name, data_dir), f"prepared folder {folder}"
            except DataError as error:
                notices.append(f"{error}; left as it is, and not used")
            except ImportError as error:
                notices.append(f"tensorflow-datasets is not installed ({error}); {folder} not read")
        elif storage.exists(folder):
            notices.append(
                f"{folder} is not in the array_record format, the one that can be read without "
                "TensorFlow; left as it is, and not used"
            )
        if originals is None:
            if unwritable is not None:
                raise DataError(
                    f"cannot write {data_dir}: {unwritable}; "
                    "choose another --data_dir, or pass --manual_dir=DIR"
                ) from unwritable
            try:
                return *builders.prepare(name, data_dir, None), f"downloaded from {source.url}"
            except ImportError as error:
                raise DataError(
                    f"tensorflow-datasets, which downloads {name}, is not installed ({error}); pip "
                    "install tensorflow-datasets, pass --manual_dir=DIR, or use --dataset=digits"
                ) from error
            except OSError as error:
                raise DataError(
                    f"cannot prepare {name} in {data_dir}: {error}; choose another --data_dir"
                ) from error
        origin = f"original files in {manual_dir}"
        if unwritable is None and not storage.exists(folder):
            try:
                return *builders.prepare(name, data_dir, manual_dir), origin
            except ImportError as error:
                notices.append(
                    f"tensorflow-datasets is not installed ({error}); read {manual_dir} directly"
                )
            except OSError as error:
                notices.append(f"cannot prepare {folder} ({error}); read {manual_dir} directly")
        return *parse(name, originals), origin

    counts = (source.train_count, source.test_count)
    return _load_cached(name, source.version, counts, data_dir, make)


def _load_cached(
    name: str,
    version: str,
    counts: tuple[int, int],
    data_dir: Path,
    make: Callable[[OSError | None, list[str]], tuple[Split, Split, str]],
) -> Dataset:
    """Reads the decoded cache of `name`, or makes the data set and writes the cache.

    Args:
        counts: how many examples train and test must have.
        make: called with the reason why `data_dir` cannot be written (or None) and a list to add
            notices to; returns train, test and the source.
    """
    path = data_dir / "decoded" / f"{name}-{version}.safetensors"
    notices: list[str] = []
    damage = None

    def cached() -> Dataset | None:
        splits = cache.read(path, *counts)
        source = f"decoded cache {path}"
        return splits and Dataset(name, *splits, source, (), class_names(name))

    try:
        if found := cached():
            return found
    except DataError as error:
        damage = str(error)
    with cache.writing(data_dir, name) as unwritable:
        # Another process may have made it while this one waited for the lock.
        with contextlib.suppress(DataError):
            if found := cached():
                return found
        try:
            train, test, source = make(unwritable, notices)
        except DataError as error:  # what went wrong before belongs to the reason
            reasons = [reason for reason in (damage, *notices, str(error)) if reason]
            raise DataError("; ".join(reasons)) from error
        if damage:
            notices.append(f"{damage}; rebuilt from: {source}")
        problem = unwritable
        if problem is None:
            try:
                cache.write(path, train, test)
            except OSError as error:
                problem = error
        if problem is not None:
            notices.append(f"cannot cache {name} ({problem}); the next start is as slow as this")
    return Dataset(name, train, test, source, tuple(notices), class_names(name))
