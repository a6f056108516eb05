"""Memory that the process keeps for itself, in place of asking the system for it again."""

import contextlib
import ctypes
import sys

# Parameters of glibc's mallopt, as its malloc.h numbers them, and what they are set to.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0, ARENA_MAX: 1}


def tune_glibc() -> None:
    """Has the C library keep what is freed, where that is glibc; elsewhere nothing is done.

    For the process's owner to call, before anything is computed. On a CPU each call of a compiled
    program allocates its temporaries and frees them: 200 MB for a step of the CNN, which glibc by
    itself returns to the system, whose pages then come one by one, filled with zeros, in the next.
    """
    for parameter, value in SETTINGS.items():
        _ask_glibc("mallopt", parameter, value)


def trim() -> None:
    """Gives the system what is free just now, such as what compiling took and is not to keep."""
    _ask_glibc("malloc_trim", 0)


def _ask_glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            getattr(ctypes.CDLL(None), name)(*arguments)
