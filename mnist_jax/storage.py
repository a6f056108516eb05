"""Files that are either whole or absent, and that prove it: SHA-256 beside each."""

import hashlib
import os
import tempfile
from pathlib import Path


class IntegrityError(ValueError):
    """A file's bytes are not the ones that were written."""


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
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it 0600, which would lock out a shared folder
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of `path` stands, in the format `sha256sum --check` reads."""
    return path.with_name(path.name + ".sha256")


def write_verified(path: Path, data: bytes) -> None:
    """Writes `path` and its digest. The digest goes first: no file is ever without one."""
    digest = hashlib.sha256(data).hexdigest()
    write_atomically(digest_path(path), f"{digest}  {path.name}\n".encode())
    write_atomically(path, data)


def read_verified(path: Path, *, max_bytes: int) -> bytes:
    """Reads `path` and checks it against the digest beside it.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: the digest is missing or differs, or the file exceeds `max_bytes`.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise IntegrityError(f"{path} is larger than {max_bytes} bytes")
    try:
        expected = digest_path(path).read_text(encoding="ascii")[:64]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} has no readable digest beside it") from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise IntegrityError(f"{path} has SHA-256 {actual}, expected {expected}")
    return data
