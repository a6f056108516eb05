"""A crash or a power cut at every point of a run's writes, and a failure of every call.

`Disk` records what `fit` does to its folder. `crashes` derives every content that the folder can
have after the process or the machine stops: of the changes that were not synced, any subset.
"""

import contextlib
import dataclasses
import errno
import io
import itertools
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import training
from shared import StopAfter

from mnist_jax import Config, fit
from mnist_jax.errors import DeviceError, InterruptedRunError
from mnist_jax.runs.checkpoint import load_saved
from mnist_jax.runs.run_dir import read_result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CALLS = {"open": io} | dict.fromkeys(("fsync", "replace", "unlink", "mkdir"), os)
STEPS = 4  # per epoch, two in each call
Content = dict[Path, bytes]


class Disk:
    """Stands between this process and a folder: records its changes, and can let calls fail.

    `errors` has the errno by the number of the call that fails with it.
    """

    def __init__(self, root: Path, errors: dict[int, int] | None = None):
        self.root, self.errors = root, errors or {}
        self.calls = 0
        self.log: list[tuple[str, Path, Any]] = []
        self._lock = threading.RLock()  # a thread saves while another appends to metrics.jsonl

    @contextlib.contextmanager
    def watched(self) -> Iterator["Disk"]:
        with contextlib.ExitStack() as stack:
            for name, module in CALLS.items():
                call = self._call(name, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, call))
            yield self

    def report(self, step: float) -> None:
        """From now on a crash must not lose what was done up to this step."""
        self.log.append(("report", self.root, step))

    def _call(self, name: str, real: Callable) -> Callable:
        def call(first, *args, **kwargs):
            if name == "open" and (not args or "x" not in args[0]):  # no new file
                return real(first, *args, **kwargs)
            is_fd = isinstance(first, int)
            path = Path(f"/proc/self/fd/{first}").readlink() if is_fd else Path(first)
            no_op = name == "mkdir" and path.exists()
            if no_op or path.name == ".lock" or not path.is_relative_to(self.root):
                return real(first, *args, **kwargs)
            with self._lock:
                number, self.calls = self.calls, self.calls + 1
                if number in self.errors:
                    raise OSError(self.errors[number], os.strerror(self.errors[number]))
                result = real(first, *args, **kwargs)
                self._record(name, path, args)
                return result

        return call

    def _record(self, name: str, path: Path, args: tuple) -> None:
        if name == "fsync" and path.is_dir():
            self.log.append(("sync folder", path, None))
        elif name in ("replace", "unlink", "mkdir"):
            self.log.append((name, path, *(Path(arg) for arg in args if name == "replace")))
        else:  # a new file, or one that is complete: Python's files do not call os.write
            self.log.append(("write", path, path.read_bytes()))
            self.log += [("sync", path, None)] * (name == "fsync")


@dataclasses.dataclass(eq=False)
class File:
    """A file, under whatever name: its content, and how much of that is on the disk for certain."""

    data: bytes = b""
    synced: bytes = b""


FOLDER = File()


def crashes(disk: Disk) -> Iterator[tuple[Content, float]]:
    """Each content of the folder after a crash, and the step that must not be lost."""
    now: dict[Path, File | None] = {}
    certain: dict[Path, File | None] = {}  # names that are on the disk whatever happens
    pending: list[tuple[Path, dict]] = []  # changes of names, and the folder whose fsync they need
    reported = -math.inf
    for op, path, *value in disk.log:
        change: dict[Path, File | None] = {}
        if op == "report":
            reported = value[0]
        elif op == "write":
            file = now.get(path)
            if file is None:
                change = {path: (file := File())}
            elif len(value[0]) > len(file.data):  # half of it, first
                file.data = value[0][: (len(file.data) + len(value[0])) // 2]
                yield contents(now, lucky=True), reported
            file.data = value[0]
        elif op == "sync":
            now[path].synced = now[path].data
        elif op == "sync folder":
            for _, synced in (p for p in pending if p[0] == path):
                certain |= synced
            pending = [p for p in pending if p[0] != path]
        else:
            changes = {"mkdir": {path: FOLDER}, "unlink": {path: None}}
            change = changes.get(op) or {path: None, value[0]: now[path]}
        if change:
            now |= change
            pending.append((path.parent, change))
        yield contents(now, lucky=True), reported  # the process ends
        assert len(pending) < 9, "many changes of names, and no fsync of their folder"
        for chosen in itertools.product((False, True), repeat=len(pending)):  # the power fails
            names = dict(certain)
            for _, some in itertools.compress(pending, chosen):
                names |= some
            for lucky in (False, True):
                yield contents(names, lucky=lucky), reported
    files = [path for path in disk.root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert contents(now, lucky=True) == {path: path.read_bytes() for path in files}


def contents(names: dict[Path, File | None], *, lucky: bool) -> Content:
    """The files; with `lucky` also the bytes that were not synced."""
    return {
        path: file.data if lucky else file.synced
        for path, file in names.items()
        if file not in (None, FOLDER) and names.get(path.parent)
    }


class Reports(StopAfter):
    def __init__(self, disk: Disk, events: int = 0):
        super().__init__(events)
        self.disk, self.steps = disk, []

    def on_chunk_end(self, epoch, step, *values):
        super().on_chunk_end(epoch, step, *values)
        self.steps.append((epoch - 1) * STEPS + step)
        if len(self.steps) > 2:  # each save waits for the one before
            self.disk.report(self.steps[-3])

    def on_train_end(self, result):
        self.disk.report(math.inf)


def interrupt_and_resume(config: Config, disk: Disk) -> None:
    first = Reports(disk, events=4)  # two chunks, the epoch's end, and a chunk
    with contextlib.suppress(InterruptedRunError):
        fit(config, callbacks=[first])
    disk.report(STEPS + 2)
    fit(config, callbacks=[Reports(disk)])


@pytest.fixture(scope="module")
def config(data_dir) -> Callable[[Path], Config]:
    defaults = {"model": "logistic", "dataset": "digits", "epochs": 2, "data_dir": data_dir}
    sizes = {"batch_size": 400, "steps_per_call": 2, "checkpoint_every": 0}
    return lambda workdir: Config(**defaults, **sizes, workdir=workdir)


@pytest.fixture(scope="module")
def recorded(config, tmp_path_factory) -> Disk:
    disk = Disk(tmp_path_factory.mktemp("recorded"))
    with disk.watched():
        interrupt_and_resume(config(disk.root / "run"), disk)
    return disk


@pytest.fixture(scope="module")
def resume(config, tmp_path_factory) -> Callable[[Path], None]:
    """Completes a run; it must equal one that nothing disturbed."""
    whole = tmp_path_factory.mktemp("whole") / "run"
    fit(config(whole))

    def complete(workdir: Path) -> None:
        fit(config(workdir))
        assert training.outcome(workdir) == training.outcome(whole)
        assert not list(workdir.rglob("*.tmp"))
        shutil.rmtree(workdir)
        jax.clear_caches()  # hundreds of programs otherwise

    return complete


def recovered_step(folder: Path) -> float:
    """The step that a run resumes from; -inf for a fresh start, inf for a complete run."""
    if read_result(folder) is not None:
        return math.inf
    if not any((folder / "checkpoints").glob("*.safetensors")):
        return -math.inf
    arrays, _, damaged = load_saved(folder)
    assert not damaged
    return int(arrays["state/step"])


def spread(items: list, count: int) -> list:
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[round(place)] for place in places]


def test_a_crash_at_any_point_loses_nothing_saved(recorded, resume, tmp_path, amount, counted):
    states: dict[frozenset, tuple[Content, float]] = {}
    for content, reported in crashes(recorded):
        # Contents that differ only in the random part of temporary names are the same.
        key = frozenset((re.sub(r"\w+\.tmp$", "", str(path)), d) for path, d in content.items())
        _, before = states.get(key, (content, reported))
        states[key] = content, max(before, reported)
    checked = spread(list(states.values()), amount(100, len(states)))
    resumed = spread(list(range(len(checked))), amount(5, len(states)))
    for number, (content, reported) in enumerate(checked):
        workdir = tmp_path / str(number)
        for path, data in content.items():
            copy = workdir / path.relative_to(recorded.root / "run")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
        assert recovered_step(workdir) >= reported
        if number in resumed:
            resume(workdir)
    counts = {"states": len(checked), "resumed": len(resumed)}
    counted("crash points", operations=len(recorded.log), **counts)


def test_every_call_that_fails_is_an_error_and_the_run_can_be_resumed(
    config, recorded, resume, tmp_path, amount, counted
):
    kinds = itertools.product(range(recorded.calls), ((errno.EIO, False), (errno.ENOSPC, True)))
    faults = spread(list(kinds), amount(4, 10**9))
    for at, (error, lasting) in faults:
        (root := tmp_path / f"{at}-{error}").mkdir()
        workdir, failing = root / "run", range(at, recorded.calls if lasting else at + 1)
        disk = Disk(root, dict.fromkeys(failing, error))
        with disk.watched(), pytest.raises(DeviceError, match=os.strerror(error)):
            interrupt_and_resume(config(workdir), disk)
        assert lasting or not list(workdir.rglob("*.tmp"))
        reported = [value[0] for op, _, *value in disk.log if op == "report"]
        assert recovered_step(workdir) >= max(reported, default=-math.inf)
        resume(workdir)
    counted("failing calls", calls=recorded.calls, faults=len(faults))
