"""Files that are either whole or absent, and that prove it: SHA-256 beside each."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax.errors import UsageError

MAX_DIGESTS_BYTES = 10_000
MAX_JSON_BYTES = 100_000_000


class IntegrityError(ValueError):
    """A file's bytes are not the ones that were written."""


def user_path(path: str | Path) -> Path:
    """A path as a user gave it, with ~ expanded if that user has a home.

    Raises:
        UsageError: no file can have that name.
    """
    expanded = Path(os.path.expanduser(path))  # noqa: PTH111  Path's raises where there is no home
    try:
        if b"\0" in os.fsencode(expanded):
            raise ValueError("it contains a null byte")
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not a path ({error}); choose another") from error
    return expanded


def exists(path: Path) -> bool:
    """Whether something is there; not what may not be looked at, or has an impossible name."""
    return os.path.exists(path)  # noqa: PTH110  Path's raises where it may not look


def is_folder(path: Path) -> bool:
    """Whether a folder is there; as `exists`."""
    return os.path.isdir(path)  # noqa: PTH112


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `path` so that a reader, or a crash at any instant, sees the old file or the new.

    The order matters: the bytes reach the disk before the name does, and the folder is
    synced last so that the rename itself survives a power cut.

    Raises:
        OSError: the file could not be written; nothing is left behind under `path`'s name.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]  # which may take less than it is given
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.chmod(0o644)  # mkstemp makes it 0600, which would lock out a shared folder
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: Path, **options: bool) -> None:
    """`path.mkdir(**options)`, and what it makes survives a power cut."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(**options)
    for folder in new:
        sync_folder(folder.parent)


def read_bounded(path: Path, *, max_bytes: float = math.inf) -> bytes:
    """Reads a file that should be small, however large it is.

    Raises:
        OSError: it cannot be read.
        IntegrityError: it exceeds `max_bytes`, or is no file at all, such as a pipe.
    """
    if path.exists() and not path.is_file():
        raise IntegrityError(f"{path} is not a file")  # opening a pipe would wait for a writer
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise IntegrityError(f"{path} is larger than {max_bytes} bytes")
        return file.read()  # given a number, Python takes the memory for so many bytes at once


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        OSError: it cannot be read.
        IntegrityError: it holds something else, or too much.
    """
    return parse_json(read_bounded(path, max_bytes=MAX_JSON_BYTES), path.name)


def parse_json(data: bytes | str, origin: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        IntegrityError: it is something else; names `origin`.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{origin} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{origin} is not a JSON object")
    return content


def parse_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by their names.

    Raises:
        IntegrityError: it is something else, or NumPy has no such type or shape.
    """
    import safetensors
    import safetensors.numpy

    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"it holds no arrays that can be read ({error})") from error


def digest_lines(contents: Mapping[str, bytes]) -> bytes:
    """The SHA-256 of each of these files, in the format `sha256sum --check` reads."""
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    return "".join(lines).encode()


def check_digest(path: Path, data: bytes, digests: Path) -> None:
    """Checks what was read from `path` against the line for it in the file `digests`.

    Raises:
        IntegrityError: there is no such line, or its SHA-256 is another.
    """
    try:
        lines = read_bounded(digests, max_bytes=MAX_DIGESTS_BYTES).decode("ascii").splitlines()
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} has no readable digest in {digests.name}") from error
    found = [
        digest for digest, _, name in (line.partition("  ") for line in lines) if name == path.name
    ]
    actual = hashlib.sha256(data).hexdigest()
    if found != [actual]:
        expected = " and ".join(found) or "no line for it"
        raise IntegrityError(f"{path} has SHA-256 {actual}, in {digests.name} stands {expected}")


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of `path` stands."""
    return path.with_name(path.name + ".sha256")


def write_verified(path: Path, data: bytes) -> None:
    """Writes `path` and its digest. The digest goes first: no file is ever without one."""
    write_atomically(digest_path(path), digest_lines({path.name: data}))
    write_atomically(path, data)


def read_verified(path: Path, *, max_bytes: float = math.inf) -> bytes:
    """Reads `path` and checks it against the digest beside it.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: the digest is missing or differs, or the file exceeds `max_bytes`.
    """
    data = read_bounded(path, max_bytes=max_bytes)
    check_digest(path, data, digest_path(path))
    return data
