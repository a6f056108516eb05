"""`train.py` in processes of its own, and what a run of it ends with."""

import json
import os
import subprocess
import sys
from pathlib import Path

from shared import ROOT, rows_without_times

from mnist_jax import Config, cli, fit

# Flags for runs of a few seconds on the digits, in many calls of the compiled program.
RUNS = {
    "logistic": ("--epochs=30", "--batch_size=20", "--steps_per_call=40"),
    "mlp": ("--epochs=20", "--batch_size=20", "--steps_per_call=20", "--dropout=0.2"),
    "cnn": ("--max_steps=24", "--batch_size=40", "--steps_per_call=1"),
}


def flags(model: str, workdir: Path, data_dir: Path) -> list[str]:
    where = [f"--workdir={workdir}", f"--data_dir={data_dir}", "--dataset=digits"]
    return [f"--model={model}", *RUNS[model], *where, "--checkpoint_every=0"]


def start(*words: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    how = {"cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}}
    return subprocess.Popen([sys.executable, "train.py", *words], **how, **pipes)


def complete(model: str, workdir: Path, data_dir: Path) -> list:
    words = flags(model, workdir, data_dir)
    fit(cli.parse(Config, words, prog="train.py", description=""), callbacks=[])
    return outcome(workdir)


def outcome(workdir: Path) -> list:
    record = json.loads((workdir / "result.json").read_text())
    return [record["params_sha256"], rows_without_times(workdir)]
