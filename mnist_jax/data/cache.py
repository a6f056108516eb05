"""The decoded arrays of a data set in one file: the second start reads this and nothing else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data.split import Split, check_split
from mnist_jax.errors import DataError

LOCK_TIMEOUT_S = 600.0


def read(path: Path, train_count: int, test_count: int) -> tuple[Split, Split] | None:
    """Returns train and test, or None where there is no such file. Takes no lock.

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    count = train_count + test_count
    try:
        # An example is 784 bytes and a label of 4; the rest is room for the header.
        data = storage.read_verified(path, max_bytes=count * 788 + 100_000)
        arrays = storage.parse_arrays(data)
        train = Split(arrays["train/image"], arrays["train/label"])
        test = Split(arrays["test/image"], arrays["test/label"])
    except OSError:
        return None
    except (storage.IntegrityError, KeyError) as error:
        raise DataError(f"the decoded cache is damaged: {error}") from error
    return check_split(train, train_count, str(path)), check_split(test, test_count, str(path))


def write(path: Path, train: Split, test: Split) -> None:
    """Writes train and test to `path`, which is whole or absent at any instant.

    Raises:
        OSError: it could not be written.
    """
    import safetensors.numpy

    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        leftover.unlink()
    arrays = {
        f"{split}/{field}": np.ascontiguousarray(array)
        for split, fields in (("train", train), ("test", test))
        for field, array in fields._asdict().items()
    }
    storage.write_verified(path, safetensors.numpy.save(arrays))


@contextlib.contextmanager
def writing(data_dir: Path, name: str) -> Iterator[OSError | None]:
    """Makes this process the only one that prepares `name` in `data_dir`.

    Yields None, or, where the folder cannot be written, the reason: then nothing is locked, and
    the caller must not write. A lock dies with its process, so a killed one blocks nobody.

    Raises:
        DataError: another process has held the lock for ten minutes.
    """
    import filelock

    lock = filelock.FileLock(data_dir / f".{name}.lock")
    refusal = None
    try:
        (data_dir / "decoded").mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout as error:
        raise DataError(
            f"another process has been preparing {name} in {data_dir} for {LOCK_TIMEOUT_S:.0f} s; "
            "wait for it, end it, or choose another --data_dir"
        ) from error
    except OSError as error:
        refusal = error
    try:
        yield refusal
    finally:
        lock.release()
