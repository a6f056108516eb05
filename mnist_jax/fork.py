"""A fork's file: Python that adds models, optimizers, losses, data sets and so on by name."""

import hashlib
import sys
import traceback
import types
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
BUILT_IN = {flag: frozenset(registry) for flag, registry in REGISTRIES.items()}
_added: dict[str, dict[str, dict[str, Any]]] = {}  # by a file's SHA-256: its entries in each


def load_fork(path: str | Path) -> str:
    """Runs a file that adds names to the registries; returns its SHA-256.

    A content runs once in a process; loading it again restores its names.

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
        before = {flag: dict(registry) for flag, registry in REGISTRIES.items()}
        module = types.ModuleType(f"fork_{digest[:8]}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        try:
            _added[digest] = _run(source, path, module, before)
        except UsageError:
            for flag, registry in REGISTRIES.items():
                registry.clear()
                registry.update(before[flag])
            raise
    for flag, entries in _added[digest].items():
        REGISTRIES[flag].update(entries)
    return digest


def _run(
    source: bytes, path: Path, module: types.ModuleType, before: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Runs the source; returns the entries that it adds to each registry."""
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)  # of a SyntaxError
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"the fork {path} fails in line {line}: {problem}") from error
    added = {
        flag: {name: new for name, new in registry.items() if before[flag].get(name) is not new}
        for flag, registry in REGISTRIES.items()
    }
    for flag, entries in added.items():
        if taken := sorted(BUILT_IN[flag] & entries.keys()):
            problem = f"the fork {path} replaces the {flag} {taken[0]!r} of mnist_jax"
            raise UsageError(f"{problem}; give its own another name")
    return added


def flags_of(path: str | Path) -> list[tuple[str, str]]:
    """The flags and values, such as ("model", "resnet"), that a fork's file adds."""
    added = _added[load_fork(path)]
    return [(flag, name) for flag, entries in added.items() for name in entries]
