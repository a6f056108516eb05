"""`train.py` in processes of their own, disturbed until they are done."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Models with flags for a run of some seconds on the digits, of many calls.
RUNS = {
    "logistic": ("--epochs=60", "--batch_size=20", "--steps_per_call=40"),
    "mlp": ("--epochs=20", "--batch_size=20", "--steps_per_call=20", "--dropout=0.2"),
    "cnn": ("--max_steps=24", "--batch_size=40", "--steps_per_call=1"),
}
SHARE = {"logistic": 0.6, "mlp": 0.3, "cnn": 0.1}  # of all disturbances


def flags(model: str, workdir: Path, data_dir: Path) -> list[str]:
    """Those of a run that saves after every call."""
    where = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--dataset=digits"]
    return [f"--model={model}", *RUNS[model], *where, "--checkpoint_every=0"]


def start(*words: str, **options: Any) -> subprocess.Popen:
    """Starts train.py with these flags; its stderr is kept."""
    defaults = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "train.py", *words]
    return subprocess.Popen(command, **{**defaults, "env": environment, **options})


def wait_until_it_listens(process: subprocess.Popen) -> None:
    """Returns once the process has handlers for SIGINT and SIGTERM: before, Python starts."""
    status, both = Path(f"/proc/{process.pid}/status"), 1 << 1 | 1 << 14
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        if caught and int(caught[1], 16) & both == both:
            return
        time.sleep(0.002)


def outcome(workdir: Path) -> tuple[str, list[dict]]:
    """What a complete run came to: its parameters' digest, and metrics.jsonl without the times."""
    record = json.loads((workdir / "result.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]
    return record["params_sha256"], timeless


class Ended(NamedTuple):
    """A process that was sent a signal, perhaps too late."""

    workdir: Path
    signal: int
    status: int
    err: str
    wait_s: float


class Campaign:
    """Runs of a model, each disturbed until it is done, and compared with one that was not."""

    def __init__(self, model: str, folder: Path, data_dir: Path):
        self.model, self.folder, self.data_dir = model, folder, data_dir
        self.random = random.Random(model)
        self.runs = self.mismatches = 0
        started = time.monotonic()
        process = start(*flags(model, folder / "whole", data_dir))
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        self.longest_s = time.monotonic() - started
        self.whole = outcome(folder / "whole")

    def run(self, signals: list[int], ready: Callable = lambda process: None) -> Iterator[Ended]:
        """Sends each process of a run one of the signals, until one ends by itself.

        The signal comes at a random moment after `ready` returns.
        """
        workdir, status = self.folder / str(self.runs), None
        self.runs += 1
        while status != 0:
            process = start(*flags(self.model, workdir, self.data_dir))
            ready(process)
            time.sleep(self.random.uniform(0, self.longest_s))
            number, sent = self.random.choice(signals), time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=300)
            status = process.returncode
            yield Ended(workdir, number, status, err, time.monotonic() - sent)
        self.mismatches += outcome(workdir) != self.whole
