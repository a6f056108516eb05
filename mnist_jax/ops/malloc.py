"""Settings of glibc's malloc: reuse freed memory instead of returning it to the system."""

import contextlib
import ctypes
import sys

# Parameters of mallopt, numbered as in glibc's malloc.h, and their values.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0, ARENA_MAX: 1}


def tune_glibc(platform: str) -> None:
    """Makes malloc keep freed memory in one arena, if the platform is cpu and glibc is there.

    Changes the whole process; call it before the first computation. On a CPU each call of a
    compiled program allocates and frees its temporaries, 200 MB for a step of the CNN. By default
    glibc returns this memory to the system, so the next call page-faults it back in. For a GPU all
    cores compile, and would wait for the one arena.
    """
    if platform != "cpu":
        return
    for parameter, value in SETTINGS.items():
        _call_glibc("mallopt", parameter, value)


def trim() -> None:
    """Returns free memory to the system once, for example what a compilation used."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)
