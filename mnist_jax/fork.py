"""A fork's file: Python that adds models, optimizers, losses, data sets and so on by name."""

import contextlib
import hashlib
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnist_jax.atomic_io import user_path
from mnist_jax.data import DATASETS
from mnist_jax.data.augment import AUGMENTATIONS
from mnist_jax.errors import UsageError, first_line
from mnist_jax.losses import LOSSES
from mnist_jax.models import MODELS
from mnist_jax.optimizer import OPTIMIZERS
from mnist_jax.presets import PRESETS

# The registries by the flag that chooses from them: those of a run's parts, and all.
COMPONENTS: dict[str, dict[str, Any]] = {"model": MODELS, "optimizer": OPTIMIZERS, "loss": LOSSES}
COMPONENTS |= {"augmentation": AUGMENTATIONS, "dataset": DATASETS}
REGISTRIES = COMPONENTS | {"preset": PRESETS}
Entries = dict[tuple[str, str], Any]  # of registries, by flag and name: ("model", "resnet")


def _entries() -> Entries:
    return {(flag, name): x for flag, entries in REGISTRIES.items() for name, x in entries.items()}


def _register(entries: Entries) -> None:
    for (flag, name), entry in entries.items():
        REGISTRIES[flag][name] = entry


BUILT_IN = frozenset(_entries())
_lock = threading.RLock()  # of the registries while they hold the names of a run that is read
_added: dict[str, Entries] = {}  # by the SHA-256 of a fork's file


@contextlib.contextmanager
def keep_names() -> Iterator[Entries]:
    """Restores the registries at the end: a run that is read must not leave its fork's names."""
    with _lock:
        before = _entries()
        try:
            yield before
        finally:
            for registry in REGISTRIES.values():
                registry.clear()
            _register(before)


def load_fork(path: str | Path) -> str:
    """Runs a file that adds names to the registries; returns its SHA-256.

    The same content runs once in a process; loading it again restores its names.

    Raises UsageError if the file cannot be read, running it raises an exception, or it replaces a
    name of the package, which other runs of the process need.
    """
    path = user_path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the fork {path}: {error.strerror}") from error
    digest = hashlib.sha256(source).hexdigest()
    if digest not in _added:
        module = types.ModuleType(f"fork_{digest[:8]}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        with keep_names() as before:
            try:
                exec(compile(source, path, "exec"), module.__dict__)
            except (Exception, SystemExit) as error:
                frames = traceback.extract_tb(error.__traceback__)
                lines = [frame.lineno for frame in frames if frame.filename == str(path)]
                line = lines[-1] if lines else getattr(error, "lineno", None)  # of a SyntaxError
                where = f"fails in line {line}" if line else "fails"
                problem = f"{where}: {type(error).__name__}: {first_line(error)}"
                raise UsageError(f"the fork {path} {problem}") from error
            added = {key: x for key, x in _entries().items() if before.get(key) is not x}
        if taken := sorted(BUILT_IN & added.keys()):
            problem = f"the fork {path} replaces the {taken[0][0]} {taken[0][1]!r} of mnist_jax"
            raise UsageError(f"{problem}; give its own another name")
        _added[digest] = added
    _register(_added[digest])
    return digest


def added_by(path: str | Path) -> list[tuple[str, str]]:
    """The flags and values, such as ("model", "resnet"), that a fork's file adds."""
    return list(_added[load_fork(path)])
