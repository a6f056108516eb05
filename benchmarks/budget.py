"""Runs commands within a budget of time, each in its own process, and joins what they found."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from benchmarks import launch, results
from benchmarks.results import Recorder
from mnist_jax.errors import MnistJaxError, UsageError

TOO_LONG = 2.5  # a command is ended after this many times what it is expected to take
POLL_S = 0.01
# What a run's result.json gives to the table of runs.
KEPT = ("model", "seeds", "steps", "test_accuracy", "test_correct", "statistics", "params_sha256")
KEPT += ("timings", "notices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of this repository.

    Attributes:
        part: what it belongs to.
        name: its own name in there.
        minutes: what it is expected to take: a guess, by which it is begun or not.
        words: what follows `python`.
        made: the file that it leaves if all goes well.
        kind: of which kind: a benchmark's results, a run's result.json, a vote's JSON on standard
            output, or the suite's folder, which stays as it is.
        kills: how often it is killed after its next checkpoint, and begun again, before it may end.
    """

    part: str
    name: str
    minutes: float
    words: list[str]
    made: Path
    kind: Literal["results", "run", "vote", "suite"]
    kills: int = 0

    def checkpoints(self) -> set[Path]:
        """Those of its run."""
        return set(self.made.parent.glob("checkpoints/*.safetensors"))


def run(
    command: Command, said: Path, limit_s: float, variables: Mapping[str, str], kill: bool = False
) -> bool:
    """Runs a command; with whatever it started it is ended at its limit.

    Args:
        command: the command.
        said: the file for its standard output; standard error goes beside it, as .err.
        limit_s: when to end it.
        variables: environment variables, where the environment does not set them.
        kill: end it after its next checkpoint.

    Returns:
        Whether it ended by itself.

    Raises:
        ProcessError: it failed, or was ended at its limit.
    """
    words, errors = [sys.executable, *command.words], said.with_suffix(".err")
    environment = {**variables, **os.environ, "PYTHONPATH": launch.python_path()}
    began, before, killed = time.monotonic(), command.checkpoints(), False
    with said.open("ab") as out, errors.open("ab") as err:
        # In a group of its own, so that what it started ends with it.
        process = subprocess.Popen(
            words, cwd=launch.ROOT, env=environment, stdout=out, stderr=err, process_group=0
        )
        try:
            while process.poll() is None and time.monotonic() - began < limit_s and not killed:
                killed = kill and bool(command.checkpoints() - before)
                time.sleep(POLL_S)
        finally:
            if running := process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if running and not killed:
        raise launch.ProcessError(f"ended after {limit_s:.0f} s, its limit")
    if process.returncode and not running:
        last = errors.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise launch.ProcessError(f"status {process.returncode}: {last[-1]}")
    return not running


def take_in(command: Command, recorder: Recorder, folder: Path, **more: Any) -> None:
    """Adds what a command left to the file, with its part and name.

    Raises:
        DataError: it left no result file.
        OSError, ValueError, IndexError: it left nothing, or something else.
    """
    of = {"part": command.part, "command": command.name, **more}
    if command.kind == "results":
        recorder.take_in(results.read(command.made), f"{command.part}/{command.name}: ", **of)
    elif command.kind == "run":
        record = json.loads(command.made.read_bytes())
        shutil.copy(command.made, folder / f"{command.name}.json")
        recorder.row("runs", **of, **{name: record.get(name) for name in KEPT})
    elif command.kind == "vote":
        recorder.row("votes", **of, **json.loads(command.made.read_text().splitlines()[-1]))


def perform(
    command: Command, recorder: Recorder, folder: Path, left_s: float, variables: Mapping[str, str]
) -> None:
    """Runs a command if it fits into what is left, and takes in what it found.

    Args:
        command: the command.
        recorder: gets what it found, or why it is left out.
        folder: for what it writes and says.
        left_s: seconds of the budget.
        variables: as in `run`.
    """
    name, context = f"{command.part}/{command.name}", recorder.context
    expected_s = 60 * command.minutes
    if expected_s > left_s:
        left = f"{max(0.0, left_s) / 60:.1f} of the budget are left"
        recorder.leave_out(name, f"it is expected to take {command.minutes:g} min, {left}")
        return
    launch.say(f"== {name}")
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / f"{command.name}.out"
    for stale in (said, said.with_suffix(".err"), said.with_suffix(".json")):
        stale.unlink(missing_ok=True)
    context["commands"][name] = f"python {' '.join(command.words)}"
    began = time.monotonic()
    deadline = began + min(left_s, TOO_LONG * expected_s)

    def ended(*, kill: bool) -> bool:
        return run(command, said, deadline - time.monotonic(), variables, kill=kill)

    try:
        ends = [ended(kill=True) for _ in range(command.kills)]
        ended(kill=False)
        take_in(command, recorder, folder, **({"kills": ends.count(False)} if ends else {}))
    except launch.ProcessError as error:
        recorder.leave_out(name, str(error))
        if command.kind == "results" and command.made.is_file():  # what it had written by then
            take_in(command, recorder, folder)
    except (MnistJaxError, OSError, ValueError, IndexError) as error:
        recorder.leave_out(name, f"it left nothing that can be read: {error}")
    spent_s = context["seconds"].get(command.part, 0.0) + time.monotonic() - began
    context["seconds"][command.part] = round(spent_s, 3)


def keep_earlier(recorder: Recorder, file: Path, parts: tuple[str, ...]) -> None:
    """Takes over what an earlier file holds of other parts than these.

    Raises:
        UsageError: it is of another device, commit or JAX.
        DataError: it is no result file.
    """
    found, context = results.read(file), recorder.context
    for name in ("device", "git_commit", "jax"):
        if (before := found.context[name]) != (now := context[name]):
            raise UsageError(f"{file} is of {before}, and this is {now}; choose another --output")
    recorder.benchmarks += [b for b in found.benchmarks if b.details["part"] not in parts]
    for table, rows in found.tables.items():
        recorder.tables[table] = [row for row in rows if row["part"] not in parts]
    for name in ("left_out", "commands", "seconds"):
        kept = found.context[name].items()
        context[name] |= {k: v for k, v in kept if k.partition("/")[0] not in parts}
