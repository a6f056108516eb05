"""Ctrl-C and SIGTERM: the first one ends a run after a checkpoint, the second one at once."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


@dataclasses.dataclass
class Stop:
    """Whether a run is asked to end."""

    signal: int | None = None  # number of the signal, once there was one
    # Set by a run that checks `signal` from now on. Before, a signal acts as without a `Stop`.
    armed: bool = False


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Records the first SIGINT or SIGTERM in a `Stop`; the next one acts as before.

    For the main thread of the process.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.armed and stop.signal is None:
            stop.signal = number
        else:  # nothing to save yet, or the second signal: files are written atomically
            signal.signal(number, before[number])
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
