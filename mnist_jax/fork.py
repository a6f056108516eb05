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
Registries = dict[str, dict[str, Any]]  # entries by name, by the flag
BUILT_IN = {flag: frozenset(entries) for flag, entries in REGISTRIES.items()}
_lock = threading.RLock()  # of the registries while they hold the names of a run that is read
_added: dict[str, Registries] = {}  # by the SHA-256 of a fork's file


@contextlib.contextmanager
def keep_names() -> Iterator[Registries]:
    """Restores the registries at the end: a run that is read must not leave its fork's names."""
    with _lock:
        before = {flag: dict(entries) for flag, entries in REGISTRIES.items()}
        try:
            yield before
        finally:
            for flag, entries in before.items():
                REGISTRIES[flag].clear()
                REGISTRIES[flag].update(entries)


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
            added = {
                flag: {n: x for n, x in entries.items() if before[flag].get(n) is not x}
                for flag, entries in REGISTRIES.items()
            }
        for flag, entries in added.items():
            if taken := sorted(BUILT_IN[flag] & entries.keys()):
                problem = f"the fork {path} replaces the {flag} {taken[0]!r} of mnist_jax"
                raise UsageError(f"{problem}; give its own another name")
        _added[digest] = added
    for flag, entries in _added[digest].items():
        REGISTRIES[flag].update(entries)
    return digest


def added_by(path: str | Path) -> list[tuple[str, str]]:
    """The flags and values, such as ("model", "resnet"), that a fork's file adds."""
    return [(flag, name) for flag, names in _added[load_fork(path)].items() for name in names]
