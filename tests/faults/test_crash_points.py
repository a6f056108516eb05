"""At every call by which a run reaches the disk the process dies, or the call fails.

All points are tried, each in a process forked for it. Then what lies on the disk is recovered as
`fit` does it, and so is whatever a power cut could have left there: of the bytes that were not
synced none or all, and of the creations, renames and removals whose folder was not synced any
choice. What was reported as done must be there in all of these.

Shown to fail without the fsync of a file, of a folder or of a new line, without that of a folder
after one was made in it; with a file written in place, renamed before its fsync, or before its
digest; with the result before its manifest; with a short write taken for a whole one, an error
dropped, a temporary file left, a checkpoint removed too early, a line that does not wait.

Run as a program, this file goes through one scene and prints what it counted.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import training
from filelock import FileLock

from mnist_jax import Config, fit
from mnist_jax import atomic_io as storage
from mnist_jax.errors import DeviceError
from mnist_jax.inference.verify import verify
from mnist_jax.runs.checkpoint import KEPT, names_of
from mnist_jax.runs.run_dir import Run

CALLS = ("open", "write", "fsync", "chmod", "replace", "unlink", "mkdir")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
DONE, RAISED, DIED = 0, 3, 9
DEATHS = {"dies before": DIED, "dies after": DIED}
FAILURES = {"ENOSPC": RAISED, "ENOSPC on": RAISED, "EIO": RAISED}  # on: of all later calls too
FAULTS = DEATHS | FAILURES  # how the process ends
WRITE_FAULTS = {"short": DONE, "short on": DONE, "part": RAISED}
CONFIG = Config(model="logistic", dataset="digits")
RECORD = {"test_accuracy": 0.5}


class File:
    """A file, whatever its name: where it is now, and what of it is on the disk for certain."""

    def __init__(self, path: Path, synced: bytes = b""):
        self.path: Path | None = path
        self.synced = synced

    def after_cut(self, *, lucky: bool) -> bytes:
        return self.path.read_bytes() if self.path and lucky else self.synced


class Raw(io.FileIO):
    """What Python's own files write to, here through `os`."""

    def write(self, data) -> int:
        return os.write(self.fileno(), data)


class Disk:
    """Stands between this process and a folder: counts the calls, and strikes at one of them.

    A power cut is what it knows of: which bytes and which names were synced.
    """

    def __init__(self, root: Path, strike_at: int, fault: str):
        self.root, self.strike_at = root, strike_at
        self.fault, _, self.when = fault.partition(" ")
        self.calls: list[str] = []
        self.opened: dict[int, File | Path] = {}  # by descriptor; a Path stands for a folder
        self.now = {p: p if p.is_dir() else File(p, p.read_bytes()) for p in root.rglob("*")}
        self.certain = dict(self.now)  # the names that are on the disk, whatever happens
        self.pending: list[tuple[Path, dict]] = []  # changes of names, by the folder to sync
        for name in CALLS:
            setattr(os, name, functools.partial(self.call, name, getattr(os, name)))
        io.open = functools.partial(self.open, io.open)
        self.locking = False
        FileLock.acquire = self.unwatched(FileLock.acquire)  # how it locks is its own affair

    def unwatched(self, real):
        def acquire(lock, *args, **kwargs):
            self.locking = True
            try:
                return real(lock, *args, **kwargs)
            finally:
                self.locking = False

        return acquire

    def open(self, real, file, mode="r", *args, **kwargs):
        if mode[0] not in "aw":
            return real(file, mode, *args, **kwargs)
        file = io.BufferedWriter(Raw(file, mode.strip("b"), opener=lambda *how: os.open(*how)))
        return file if "b" in mode else io.TextIOWrapper(file)

    def call(self, name, real, *args, **kwargs):
        at = self.opened.get(args[0]) if name in ("write", "fsync") else Path(args[0])
        path = at.path if isinstance(at, File) else at
        ours = not self.locking and path and path.is_relative_to(self.root)
        if not ours or (name == "mkdir" and path.exists()):
            result = real(*args, **kwargs)
            self.opened.pop(result if name == "open" else None, None)
            return result
        number = len(self.calls)
        self.calls.append(name)
        struck = number == self.strike_at or (self.when == "on" and number > self.strike_at)
        fault = self.fault if struck else ""
        if fault in ERRORS:
            raise OSError(ERRORS[fault], os.strerror(ERRORS[fault]))
        if fault == "dies" and self.when == "before":
            self.end(DIED)
        if fault in ("short", "part") and name == "write":
            args = args[0], args[1][: (len(args[1]) + 1) // 2]
        result = real(*args, **kwargs)
        self.note(name, at, args, result)
        if fault == "part":
            raise OSError(errno.ENOSPC, "after a part of it")
        if fault == "dies":
            self.end(DIED)
        return result

    def note(self, name, at, args, result) -> None:
        """Keeps account of what a power cut could take."""
        change = {}
        if name == "open":
            if args[1] & os.O_CREAT and not self.now.get(at):
                change = {at: File(at)}
            self.opened[result] = change.get(at) or self.now.get(at, at)
        elif name == "mkdir":
            change = {at: at}
        elif name == "unlink":
            change = {at: None}
        elif name == "replace":
            change = {at: None, Path(args[1]): self.now[at]}
        elif name == "fsync" and isinstance(at, File):
            at.synced = at.path.read_bytes()
        elif name == "fsync":
            for _, synced in (p for p in self.pending if p[0] == at):
                self.certain |= synced
            self.pending = [p for p in self.pending if p[0] != at]
        for path, file in change.items():
            if isinstance(old := self.now.get(path), File):
                old.path = None
            if isinstance(file, File):
                file.path = path
        if change:
            self.now |= change
            self.pending.append((at.parent, change))

    def end(self, status: int) -> None:
        """Ends the process, and leaves beside the folder what a power cut may make of it."""
        cuts = []
        for chosen in itertools.product((False, True), repeat=len(self.pending)):
            names = dict(self.certain)
            for _, change in itertools.compress(self.pending, chosen):
                names |= change
            for lucky in (False, True):
                cut = {
                    path.relative_to(self.root): file.after_cut(lucky=lucky)
                    for path, file in names.items()
                    if isinstance(file, File)
                    and all(names.get(p) for p in path.parents if self.root in p.parents)
                }
                if cut not in cuts:
                    cuts.append(cut)
        for number, cut in enumerate(cuts):
            (folder := self.root.with_name(f"cut-{number}")).mkdir()
            for path, data in cut.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
        self.root.with_name("calls").write_text(json.dumps(self.calls))
        os._exit(status)


def arrays(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"step": np.array(step), "params": {"a": rng.normal(size=(3, 4)), "b": np.zeros(0)}}


def rows(step: int) -> list[dict]:
    return [{"epoch": n, "step": n} for n in range(1, step + 1)]


def begin(folder: Path) -> Run:
    """As `fit` does, whether there is something or not."""
    run = Run(folder, CONFIG)
    if run.result is None:
        run.write_environment({})
        found = run.restore(arrays(0))
        run.write_metrics(found[1]["rows"] if found else [])
        if not found:
            save(run, 0)  # the first call's, before any line
    return run


def save(run: Run, step: int) -> None:
    run.checkpoints.save(step, step, arrays(step), {"rows": rows(step)})


def epochs(run: Run, *steps: int) -> Run:
    for step in steps:
        run.append_metrics(rows(step)[-1])
        save(run, step)
    run.checkpoints.wait()
    return run


def beginning(folder):
    yield  # all that follows is struck at
    epochs(begin(folder), 1)


def resumption(folder):
    run = epochs(begin(folder), 1)
    run.append_metrics(rows(2)[-1])
    run.close()
    yield
    begin(folder)


def end(folder):
    """The last epoch, whose checkpoint is the fifth and takes the place of the second."""
    run = epochs(begin(folder), 1, 2, 3)
    yield
    epochs(run, 4).finish(RECORD)


SCENES = {  # the states that may be recovered, the last once all is done
    beginning: ("nothing", "step 0", "step 1"),
    resumption: ("step 1",),
    end: ("step 3", "step 4", "result"),
}


def assert_holds(run: Run, step: int) -> None:
    """Bit for bit, and with no notice of a damaged file."""
    found, rest, notices = run.restore(arrays(0))
    got, want = names_of(found), names_of(arrays(step))
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}
    assert (rest, notices) == ({"rows": rows(step)}, [])


def recovered(folder: Path) -> str:
    """What a folder holds, from which the run is then carried on to its end."""
    begun = (folder / "config.json").exists()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    with contextlib.closing(begin(folder)) as run:
        state = "result"
        run.checkpoints.wait()
        if run.result is None:
            step = len(run.restore(arrays(0))[1]["rows"])
            state = f"step {step}" if begun else "nothing"
            assert_holds(run, step)
            assert lines <= step + 1  # `verify` would call more of them damage
            assert metrics.read_text().splitlines() == [json.dumps(row) for row in rows(step)]
            epochs(run, step + 1)
            assert_holds(run, step + 1)
            assert len(list(folder.glob("checkpoints/*.safetensors"))) <= KEPT
            run.finish(RECORD)
        assert run.result == RECORD
        next(verify(folder))  # the files
    return state


def content(disk: Path) -> frozenset:
    """All files, whatever the temporary ones are called: what is recovered depends on no more."""
    files = [path for path in disk.rglob("*") if path.is_file() and path.name != ".pid"]
    names = [re.sub(r"\w+\.tmp$", "", str(path.relative_to(disk))) for path in files]
    return frozenset(zip(names, (path.read_bytes() for path in files), strict=True))


def strike(scene, case: Path, at: int, fault: str) -> int:
    """Goes through a scene in a process of its own; returns how that ended."""
    (root := case / "disk").mkdir(parents=True)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        acts = scene(root / "run")
        next(acts)
        disk = Disk(root, at, fault)
        try:
            next(acts, None)
        except (OSError, DeviceError):
            disk.end(RAISED)
        disk.end(DONE)
    finally:
        traceback.print_exc()
        os._exit(1)


def judge(scene, known: dict, case: Path, at: int, fault: str, ending: int) -> dict[str, list]:
    """Sorts what is on the disk after a fault, and what may be, by the state recovered from it."""
    found = {"old": [], "new": [], "lost": []}
    *before, after = SCENES[scene]
    ended = strike(scene, case, at, fault)
    for disk in (case / "disk", *case.glob("cut-*")):
        try:
            assert ended == ending, f"ended with {ended}"
            if ending == RAISED and disk.name == "disk" and " " not in fault:
                assert not list(disk.rglob("*.tmp"))
            if (key := content(disk)) not in known:
                known[key] = recovered(disk / "run")
            state = known[key]
            assert state == after or (state in before and ending != DONE), state
            found["new" if state == after else "old"].append(disk.name)
        except Exception:
            found["lost"].append(f"{fault} at {at}, {disk.name}: {traceback.format_exc(-1)}")
    return found


def main(scene, folder: Path) -> None:
    """Goes through all points of a scene."""
    os.fsync = lambda fd: None  # what it does for the disk is in `Disk.note`
    at_each = functools.partial(judge, scene, {})
    founds = [at_each(folder / "whole", -1, "", DONE)]
    calls = json.loads((folder / "whole" / "calls").read_text())
    for at, name in enumerate(calls):
        for fault, ending in (FAULTS | (WRITE_FAULTS if name == "write" else {})).items():
            founds.append(at_each(folder / "case", at, fault, ending))
            shutil.rmtree(folder / "case")
    total = {name: sum(len(found[name]) for found in founds) for name in founds[0]}
    print(json.dumps({"calls": len(calls), "points": len(founds), **total}))
    print(*itertools.chain(*(found["lost"] for found in founds)), sep="\n", file=sys.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_every_point_recovers_the_old_or_the_new_state(scene, counted):
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what is lost is decided here
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, __file__, scene.__name__, folder],
            env={**os.environ, "PYTHONPATH": str(training.ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    counted("crash points", what=scene.__name__, **counts)
    assert counts["lost"] == 0, done.stderr[:3000]


def test_a_run_whose_first_save_after_an_epoch_fails_goes_on(data_dir, tmp_path, monkeypatch):
    """Shown to fail with the first call not saved, so that a line is left and no checkpoint."""
    where = {"data_dir": data_dir, "workdir": tmp_path / "run"}
    config = Config(model="logistic", dataset="digits", epochs=2, **where)
    write = storage.write_verified

    def full(path, data):
        if path.name.startswith("epoch-0001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patched, pytest.raises(DeviceError):
        patched.setattr(storage, "write_verified", full)
        fit(config)
    assert fit(config).record["epochs"] == 2


if __name__ == "__main__":
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
