"""Checkpoints: all a run needs to go on as if it had never stopped, one safetensors file each.

    checkpoints/epoch-0001-step-00000600.safetensors   arrays, and the rest as JSON in its metadata
    checkpoints/…same name….sha256                     its digest, as `sha256sum --check` reads it

A file is written beside its place, synced and renamed, so it is whole or absent, and its digest
proves it. Nothing in it can run code, and nothing outside the folder is ever read or written.
"""

import concurrent.futures
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.errors import CheckpointError

VERSION = "1"
KEPT = 3  # the newest ones
MAX_HEADER_BYTES = 100_000_000  # as much as safetensors reads; a line of metrics takes some 300
NAME = re.compile(r"epoch-(\d{4,})-step-(\d{8,})\.safetensors")

Tree = Any
"""Nested tuples and dicts of arrays."""


def names_of(tree: Tree) -> dict[str, Any]:
    """The tree's leaves by their paths, such as "state/params/dense1/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tree_bytes(tree: Tree) -> int:
    """The bytes of all arrays of a tree, or of arrays of its shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def max_bytes(template: Tree) -> int:
    """The most that a checkpoint of such arrays can take."""
    return tree_bytes(template) + MAX_HEADER_BYTES


class CheckpointManager:
    """The checkpoints in one folder; one process at a time may hold it. Close it in the end.

    `save` returns at once and writes behind the caller's back, one file at a time. A write that
    failed is raised by the next `save` or `wait`.

    Args:
        folder: made with the first save.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._has_one = False

    def save(self, epoch: int, step: int, arrays: Tree, rest: Mapping[str, Any]) -> None:
        """Saves the state after so many epochs and updates; all but the newest `KEPT` are removed.

        Args:
            epoch: epochs completed.
            step: updates completed. The two name the file.
            arrays: copied before this returns, so the caller may donate them.
            rest: what JSON can hold.

        Raises:
            OSError: this save could not be begun, or the last one failed.
        """
        self.wait()
        # Copies: on a CPU `device_get` may give views of buffers that the next step reuses.
        copies = {name: np.array(leaf) for name, leaf in names_of(jax.device_get(arrays)).items()}
        # Now, while nothing changes it.
        metadata = {"format": VERSION, "rest": json.dumps(rest)}
        self._pending = self._writer.submit(self._write, epoch, step, copies, metadata)

    def wait(self) -> None:
        """Returns once the last save is on the disk.

        Raises:
            OSError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def wait_for_one(self) -> None:
        """Returns once a checkpoint is on the disk, where no power cut can take it back.

        Raises:
            OSError: the one that was begun could not be written.
        """
        if not self._has_one:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def close(self) -> None:
        """Waits for the last save, whatever becomes of it, and lets the thread go."""
        self._writer.shutdown(wait=True)

    def _write(
        self, epoch: int, step: int, arrays: dict[str, np.ndarray], metadata: dict[str, str]
    ) -> None:
        import safetensors.numpy

        path = self.folder / f"epoch-{epoch:04d}-step-{step:08d}.safetensors"
        storage.make_folder(self.folder, exist_ok=True)
        storage.write_verified(path, safetensors.numpy.save(arrays, metadata))
        self._has_one = True
        for old in self._paths()[KEPT:]:
            old.unlink(missing_ok=True)  # first the file, so that none is without its digest
            storage.digest_path(old).unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """The files, newest first."""
        if not self.folder.is_dir():
            return []
        found = {path: NAME.fullmatch(path.name) for path in self.folder.iterdir()}
        numbers = {path: (int(m[2]), int(m[1])) for path, m in found.items() if m}
        return sorted(numbers, key=lambda path: numbers[path], reverse=True)

    def clean_up(self) -> None:
        """Removes what a killed process was writing. Only for who holds the folder."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def load(self, template: Tree) -> tuple[Tree, dict[str, Any], list[str]] | None:
        """The newest checkpoint that proves whole, or None where there has never been one.

        Args:
            template: the tree of arrays, or of their shapes and dtypes, that was saved.

        Returns:
            The arrays as NumPy's, the rest, and a notice for each damaged file passed over.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """
        notices = []
        try:
            paths = self._paths()
        except OSError as error:
            raise CheckpointError(f"cannot look into {self.folder}: {error}") from error
        for path in paths:
            try:
                found = self._read(path, template)
                self._has_one = True
                if notices:
                    notices[-1] += f"; {path.name} is used in its place"
                return *found, notices
            except (CheckpointError, OSError) as error:
                notices.append(f"the checkpoint {path} cannot be used ({error})")
        if notices:
            raise CheckpointError(
                f"{'; '.join(notices)}; restore one of them, or remove {self.folder.parent} to "
                "start again"
            )
        return None

    def _read(self, path: Path, template: Tree) -> tuple[Tree, dict[str, Any]]:
        if self.folder.is_symlink() or path.is_symlink():
            raise CheckpointError("it is a symbolic link")
        wanted = names_of(template)
        try:
            data = storage.read_verified(path, max_bytes=max_bytes(template))
            arrays = storage.parse_arrays(data)
            metadata = _metadata(data)
        except storage.IntegrityError as error:
            raise CheckpointError(str(error)) from error
        if metadata.get("format") != VERSION:
            raise CheckpointError(
                f"it is of format version {metadata.get('format')!r}; this program reads {VERSION}"
            )
        try:
            rest = storage.parse_json(metadata["rest"], "its metadata")
        except (storage.IntegrityError, KeyError) as error:
            raise CheckpointError(f"its metadata cannot be read: {error}") from error
        for name in sorted(wanted.keys() | arrays.keys()):
            if name not in arrays or name not in wanted:
                raise CheckpointError(f"{name} is {'missing' if name in wanted else 'unknown'}")
            found, leaf = arrays[name], wanted[name]
            if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                raise CheckpointError(
                    f"{name} is {found.dtype}{list(found.shape)}, expected "
                    f"{leaf.dtype}{list(leaf.shape)}"
                )
        return jax.tree.unflatten(jax.tree.structure(template), list(map(arrays.get, wanted))), rest


def _metadata(data: bytes) -> dict[str, str]:
    """The text that safetensors keeps beside the arrays: 8 bytes of length, then a JSON header."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__") or {}
