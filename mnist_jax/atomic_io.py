"""Atomic, durable writes, and files that a SHA-256 digest beside them verifies."""

import errno
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


class IntegrityError(ValueError):
    """A file is not what was written."""


def user_path(path: str | Path) -> Path:
    """A path as a user gave it, with ~ expanded if that user has a home."""
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash at any time, sees the old content or the new.

    The bytes are synced before the rename, and the folder after it, so that both survive a power
    cut. The file's mode is that of any new file.

    Raises OSError if the file cannot be written, or `path` is a device or a folder.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "no regular file", str(path))  # a rename replaces /dev/null
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes new names in a folder survive a power cut, where the file system can."""
    if os.name == "posix":  # Windows cannot open a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise
        finally:
            os.close(folder)


def make_folder(path: Path, **options: bool) -> None:
    """`path.mkdir(**options)`; the new folders survive a power cut."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(**options)
    for folder in new:
        sync_folder(folder.parent)


def digest_lines(contents: Mapping[str, bytes]) -> bytes:
    """The SHA-256 of each of these files, in the format of `sha256sum --check`."""
    lines = (f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    return "".join(lines).encode()


def digest_path(path: Path) -> Path:
    """The file that holds the SHA-256 of `path`."""
    return path.with_name(path.name + ".sha256")


def write_verified(path: Path, data: bytes) -> None:
    """Writes a file and, before it, its digest: no file is ever without one."""
    write_atomically(digest_path(path), digest_lines({path.name: data}))
    write_atomically(path, data)


def read_verified(path: Path, digests: Path | None = None) -> bytes:
    """Reads a file; raises IntegrityError if its digest in `digests` is missing or differs.

    None: the digest is in the file beside it, as from `write_verified`.
    """
    data, digests = path.read_bytes(), digests or digest_path(path)
    try:
        lines = digests.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise IntegrityError(f"{path} has no readable digest in {digests.name}") from error
    if digest_lines({path.name: data}) not in lines:
        raise IntegrityError(f"{path} differs from its SHA-256 in {digests.name}")
    return data
