"""Where the time of a chosen window goes, operation by operation."""

import contextlib
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from mnist_jax import atomic_io as storage
from mnist_jax.errors import DataError, DeviceError
from mnist_jax.steps import TrainState, step_of


class Operation(NamedTuple):
    """An operation of the compiled programs, all its occurrences together.

    Attributes:
        name: as the compiler calls it.
        times: how often it ran.
        total_s: for how long in all; on a CPU summed over threads.
        share: of the time of all operations.
    """

    name: str
    times: int
    total_s: float
    share: float


def make_folder(folder: Path) -> None:
    """Makes the folder of a trace; better before a run than in it.

    Raises:
        DeviceError: it cannot be made.
    """
    try:
        storage.make_folder(folder, parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"cannot write {folder} ({error.strerror}); choose another --profile"
        ) from error


@contextlib.contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Writes a trace of what runs inside into `folder`, for TensorBoard or Perfetto.

    Raises:
        DeviceError: the folder cannot be made.
    """
    make_folder(folder)
    with jax.profiler.trace(folder):
        yield


class Call(NamedTuple):
    """What a call of training steps is to do.

    Attributes:
        most: how many steps it may run.
        exact: it is to run as many, and not fewer.
        folder: where a trace of it is written; None for no trace.
    """

    most: int
    exact: bool = False
    folder: Path | None = None


class Window:
    """The one call of a run of which a trace is made.

    Args:
        folder: where it is written; None for no trace.
        numbers: of its first and its last step, counted from 1; None for the program's second call,
            as the first also does what is done once.
    """

    def __init__(self, folder: Path | None, numbers: tuple[int, int] | None):
        self._folder, self._numbers = folder, numbers  # no folder once the trace is written

    def call(self, state: TrainState, most: int, *, first: bool) -> Call:
        """The next call from this state: calls end where the window begins, and where it ends.

        Args:
            state: before it.
            most: how many steps it may run at most.
            first: the program has not been called before.
        """
        folder = self._folder
        if folder is None or (self._numbers is None and first):
            return Call(most)
        if self._numbers is None:
            self._folder = None
            return Call(most, folder=folder)
        (begin, last), done = self._numbers, step_of(state)
        if done + 1 < begin:
            return Call(min(most, begin - 1 - done))
        if done >= last:  # so far had the run come before
            return Call(most)
        self._folder = None
        return Call(min(most, last - done), exact=True, folder=folder)


# What only holds others: their time is counted where it is spent.
CONTAINERS = ("while", "call", "conditional")


def costliest(folder: Path, count: int = 10, *, since: float = 0.0) -> list[Operation]:
    """The operations that took most of the newest trace in a folder, the costliest first.

    Raises:
        DataError: the folder holds no trace made `since` that time, in seconds of the epoch.
    """
    # The trace in JSON: reading the other one ends the process with some versions of JAX.
    made = {path: path.stat().st_mtime for path in folder.rglob("*.trace.json.gz")}
    traces = sorted((path for path in made if made[path] >= since), key=made.__getitem__)
    if not traces:
        raise DataError(f"{folder} holds no trace; make one with --profile")
    with gzip.open(traces[-1]) as file:
        events = json.load(file)["traceEvents"]
    spent: dict[str, list[float]] = {}
    for event in events:
        # Each operation has an event that names it; others tell of threads and waiting.
        if "hlo_op" in event.get("args", {}):
            spent.setdefault(event["name"], []).append(event["dur"] * 1e-6)
    totals = {
        name: (len(times), sum(times))
        for name, times in spent.items()
        if name.partition(".")[0] not in CONTAINERS
    }
    whole = sum(total_s for _, total_s in totals.values())
    found = [Operation(name, n, s, s / whole if whole else 0.0) for name, (n, s) in totals.items()]
    return sorted(found, key=lambda operation: -operation.total_s)[:count]


def show_costliest(operations: Sequence[Operation], console: Console) -> None:
    """Prints them as a table."""
    table = Table(title="costliest operations")
    table.add_column("operation")
    for heading in ("times", "ms", "share"):
        table.add_column(heading, justify="right")
    for found in operations:
        ms, share = f"{1e3 * found.total_s:.3f}", f"{100 * found.share:.1f} %"
        table.add_row(found.name, f"{found.times:,}", ms, share)
    console.print(table)
