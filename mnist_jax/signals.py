"""Ctrl-C and SIGTERM: asked once, a run saves and ends; asked twice, it leaves."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Terminated(BaseException):
    """SIGTERM, before the run listens to its `Stop`."""


class Stop:
    """Whether a run has been asked to end.

    Attributes:
        signal: the signal's number, once one has come.
        heeded: set by a run that looks at `signal` from here on. Until then the signal raises.
    """

    def __init__(self):
        self.signal: int | None = None
        self.heeded = False


@contextlib.contextmanager
def heard() -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a `Stop`. For the process's main thread.

    Raises:
        KeyboardInterrupt: SIGINT while nobody heeds the `Stop`.
        Terminated: the same of SIGTERM.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal == number == signal.SIGINT:
            os._exit(128 + number)  # asked twice; whatever is being written is whole or absent
        stop.signal = number
        if not stop.heeded:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
