"""`train.py` in several processes that are one run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# 1,437 training images: batches of 75 divide neither into two parts nor into four, nor do the rest.
FIELDS = {"model": "mlp", "hidden_sizes": (16,), "dataset": "digits", "batch_size": 75}
FLAGS = ("--model=mlp", "--hidden_sizes", "16", "--dataset=digits", "--batch_size=75")
SECONDS = 300  # no test waits longer


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(*flags: Any, setup: str = "", prefix: Sequence[str] = (), **options: Any):
    """Starts train.py with these flags.

    Args:
        setup: Python to run first.
        prefix: what starts Python, such as `ip netns exec NAME`.
        options: of `subprocess.Popen`; `env` is added to this process's.
    """
    program = (
        "import sys, train, mnist_jax.parallel.processes as p; "
        f"{setup}; sys.exit(train.main(sys.argv[1:]))"
    )
    command = [*prefix, sys.executable, *(("-c", program) if setup else (str(ROOT / "train.py"),))]
    # Of a proxy JAX warns.
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    more = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
    env = {**inherited, **more}
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([*command, *map(str, flags)], **{**kept, **options}, env=env)


def start_all(count: int, *flags: Any, host: str = "localhost", **options: Any):
    """Starts a run in so many processes."""
    numbers = f"--coordinator={host}:{free_port()}", f"--num_processes={count}"
    return [start(*flags, *numbers, f"--process_id={n}", **options) for n in range(count)]


def ends(processes: Sequence[subprocess.Popen], *, within_s: float = SECONDS) -> list[Ended]:
    """How they ended; those that did not in time are killed, and the test fails."""
    until = time.monotonic() + within_s
    try:
        found = []
        for process in processes:
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
            found.append(Ended(process.returncode, without_gloo(out), err))
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def without_gloo(out: str) -> str:
    """Without the line that the library under JAX's collectives on a CPU prints."""
    return "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))


def run(count: int, *flags: Any, **options: Any) -> list[Ended]:
    return ends(start_all(count, *flags, **options))


def wait_for_epochs(workdir: Path, epochs: int, process: subprocess.Popen) -> None:
    """Returns once the run has trained so many."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < epochs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def record(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "result.json").read_text())
