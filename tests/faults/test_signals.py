"""SIGKILL, SIGINT and SIGTERM at random moments; the run is resumed until it is complete."""

import itertools
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

NUMBERS = {"logistic": 150, "mlp": 80, "cnn": 30}  # of signals, with --campaign
SLOW = [pytest.param(name, marks=pytest.mark.campaign) for name in ("mlp", "cnn")]


def wait_until_saved(process: subprocess.Popen, workdir: Path) -> None:
    handles = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        if caught and int(caught[1], 16) & handles and (workdir / "checkpoints").exists():
            return
        time.sleep(0.01)


def is_as_stated(workdir: Path, err: str) -> bool:
    at = re.fullmatch(r"interrupted at step (\d+); to resume, run the same command .*\n", err)
    if at is None:
        return err in ("", "interrupted\n")  # the process did not train yet
    names = [path.name for path in (workdir / "checkpoints").glob("*.safetensors")]
    return max(int(re.search(r"step-(\d+)", name)[1]) for name in names) == int(at[1])


@pytest.mark.parametrize("model", ["logistic", *SLOW])
def test_a_disturbed_run_ends_with_the_same_bits(model, whole, data_dir, tmp_path, amount, counted):
    rng, total = random.Random(model), amount(2, NUMBERS[model])
    signals = itertools.cycle((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
    sent, wrong, runs, mismatches = {}, [], 0, 0
    longest_s, slowest_exit_s = 1.0, 0.0
    while sum(sent.values()) < total and not wrong:
        workdir, number = tmp_path / str(runs), next(signals)
        process = training.start(*training.flags(model, workdir, data_dir))
        wait_until_saved(process, workdir)
        ready = time.monotonic()
        time.sleep(rng.uniform(0, longest_s))
        process.send_signal(number)
        signalled = time.monotonic()
        _, err = process.communicate(timeout=300)
        if process.returncode == 0:  # the run was complete before
            longest_s = max(longest_s, time.monotonic() - ready)
            runs, mismatches = runs + 1, mismatches + (training.outcome(workdir) != whole(model))
        elif process.returncode not in (-number, 128 + number):
            wrong.append((process.returncode, err))
        elif number != signal.SIGKILL and not is_as_stated(workdir, err):
            wrong.append((number, err))
        else:
            sent[number.name] = sent.get(number.name, 0) + 1
            slowest_exit_s = max(slowest_exit_s, time.monotonic() - signalled)
    if not wrong:  # the last one is resumed in this process, which takes less time to start
        outcome = training.complete(model, tmp_path / str(runs), data_dir)
        runs, mismatches = runs + 1, mismatches + (outcome != whole(model))
    counts = {"runs": runs, "mismatches": mismatches, "wrong": len(wrong), **sent}
    counted("signals", model=model, **counts, slowest_exit_s=round(slowest_exit_s, 2))
    assert (wrong, mismatches) == ([], 0)
