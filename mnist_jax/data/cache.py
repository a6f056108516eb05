"""The decoded arrays of a data set in one safetensors file, which a later start reads."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import safetensors.numpy

from mnist_jax import atomic_io
from mnist_jax.data.dataset import Split
from mnist_jax.errors import DataError

LOCK_TIMEOUT_S = 600


def read(path: Path) -> tuple[Split, Split] | None:
    """Returns train and test; None if there is no such file, or it may not be read.

    Raises:
        DataError: the file is damaged.
    """
    try:
        arrays = safetensors.numpy.load(atomic_io.read_verified(path))
    except OSError:
        return None
    except atomic_io.IntegrityError as error:
        raise DataError(f"the decoded cache is damaged: {error}; delete {path}") from error
    train, test = (Split(arrays[f"{s}/image"], arrays[f"{s}/label"]) for s in ("train", "test"))
    return train, test


def write(path: Path, train: Split, test: Split) -> None:
    """Writes train and test to `path`, atomically."""
    arrays = {"train/image": train.image, "train/label": train.label}
    arrays |= {"test/image": test.image, "test/label": test.label}
    atomic_io.write_verified(path, safetensors.numpy.save(arrays))


def lock(data_dir: Path, name: str) -> AbstractContextManager[object]:
    """Makes this process the only one that prepares `name` in `data_dir`, within a `with` block.

    Raises:
        DataError: `data_dir` cannot be written, or another process holds the lock too long.
    """
    import filelock

    try:
        (data_dir / "decoded").mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(data_dir / f".{name}.lock").acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout as error:
        problem = f"another process has been preparing {name} for {LOCK_TIMEOUT_S} s"
        raise DataError(f"{problem}; wait for it or end it") from error
    except OSError as error:
        if error.errno in atomic_io.NO_LOCKS:  # two processes may then do the same work
            return nullcontext()
        raise DataError(f"cannot write {data_dir}: {error}; choose another --data_dir") from error
