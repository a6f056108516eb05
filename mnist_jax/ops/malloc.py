"""Settings of glibc's malloc: reuse freed memory instead of returning it to the system."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of mallopt, numbered as in glibc's malloc.h, and their values.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0, ARENA_MAX: 1}


def tune_glibc() -> None:
    """Makes malloc keep freed memory in one arena; does nothing without glibc.

    Changes the whole process; call it before JAX starts a backend, whose threads take arenas. On a
    CPU each call of a compiled program allocates and frees its temporaries, 200 MB for a step of
    the CNN. By default glibc returns this memory to the system, so the next call page-faults it
    back in. Where JAX has an accelerator's plugin nothing changes: all cores compile for it, and
    would wait for the one arena.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and has_accelerator():
        return
    for parameter, value in SETTINGS.items():
        _call_glibc("mallopt", parameter, value)


def has_accelerator() -> bool:
    """Whether JAX is installed with a plugin for a GPU or TPU; starts none."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def trim() -> None:
    """Returns free memory to the system once, for example what a compilation used."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)
