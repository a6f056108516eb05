"""Signals: the first one ends a run after a checkpoint, the second one at once; none is lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Ctrl-C; a scheduler's end and its warning; a lost terminal.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


@contextlib.contextmanager
def catch_signals(caught: list[int]) -> Iterator[None]:
    """Adds the number of the first signal of `NAMES` to the list; the next one acts as before.

    A signal that the process ignores, as SIGHUP under nohup, or handles in a way of its own, stays
    as it is. Only the main thread can handle signals: in another one nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if not caught:
            caught.append(number)
        else:  # files are written atomically
            signal.signal(number, before[number])
            signal.raise_signal(number)

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    usual: Any = (signal.SIG_DFL, signal.default_int_handler)
    before = {n: handler for n in numbers if (handler := signal.getsignal(n)) in usual}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def repeat_dropped_interrupts() -> Iterator[None]:
    """Repeats a Ctrl-C that Python drops in a callback of its garbage collector, as JAX has one."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:  # after the hook's end, also on a busy machine
            threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
