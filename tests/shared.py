"""What tests read of a run's folder, how they interrupt a run, and processes of Python."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mnist_jax import Callback

ROOT = Path(__file__).parents[1]


def python(*words: Any, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which must succeed; it finds this package and tests/."""
    command, path = [sys.executable, *map(str, words)], f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = os.environ | {"PYTHONPATH": path} | variables
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows_of(folder)]


def write_forks(folder: Path) -> None:
    """Writes the files of docs/forking.md: the Python blocks that begin with a file's name."""
    page = (ROOT / "docs" / "forking.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(code)


class StopAfter(Callback):
    """Asks for the end of a run at its n-th chunk or epoch."""

    def __init__(self, events: int = 0):
        self.events = events

    def on_chunk_end(self, epoch, batch, num_batches, metrics, train_s):
        self.on_epoch_end({})

    def on_epoch_end(self, row):
        self.events -= 1
        if self.events == 0:
            signal.raise_signal(signal.SIGUSR1)
