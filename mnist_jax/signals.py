"""Ctrl-C and SIGTERM: asked once, a run saves and ends; asked twice, it leaves."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stop:
    """Whether a run has been asked to end.

    Attributes:
        signal: the signal's number, once one has come.
        heeded: set by a run that looks at `signal` from here on. Until then a signal does what it
            did before there was a `Stop`.
    """

    def __init__(self):
        self.signal: int | None = None
        self.armed = False


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a `Stop`; the next does what it did before.

    For the process's main thread.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        earlier = before[number]
        if stop.armed and stop.signal is None:
            stop.signal = number
        elif callable(earlier):  # asked twice: whatever is being written is whole or absent
            earlier(number, frame)
        elif earlier == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
