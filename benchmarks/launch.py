"""Starts the processes that are measured, and the commands that measure them."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mnist_jax import cli
from mnist_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
Options = TypeVar("Options")


class ProcessError(Exception):
    """A measured process failed; the message is its last line."""


class Finished(NamedTuple):
    """A process that ended well.

    Attributes:
        output: what it printed, or answered.
        wall_s: from its start to its exit.
        others_share: the share of all cores' time that went to anybody else meanwhile; None where
            the system does not say.
    """

    output: Any
    wall_s: float
    others_share: float | None


def run(python: Path, arguments: Sequence[str]) -> Finished:
    """Runs Python with these arguments in the repository's root.

    Raises:
        ProcessError: it did not exit with 0.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["JAX_PLATFORMS"] = "cpu"  # where the peers run too
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # compiling is part of what is measured
    command = [str(python), *arguments]
    before_s, started = _others_s(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    wall_s, after_s = time.perf_counter() - started, _others_s()
    share = None
    if before_s is not None and after_s is not None:
        share = max(0.0, after_s - before_s) / (wall_s * (os.cpu_count() or 1))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ProcessError(last.removeprefix("ModuleNotFoundError: "))
    return Finished(done.stdout, wall_s, share)


def _others_s() -> float | None:
    """Processor seconds since boot that neither idled nor went to our own ended children."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields)
    used_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used_s - ours.ru_utime - ours.ru_stime


def ask(python: Path, module: str, question: Mapping[str, Any]) -> Finished:
    """Runs `module` with the question as JSON; its output is the JSON on its last line."""
    done = run(python, ["-m", module, json.dumps(question)])
    return done._replace(output=json.loads(done.output.splitlines()[-1]))


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def check_options(options: Any) -> None:
    """Refuses numbers below 1 and an interpreter that is not there."""
    for name, value in vars(options).items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} is {value}; allowed is 1 or more; change --{name}")
    python = getattr(options, "peers_python", None)
    if python is not None and not python.is_file():
        raise UsageError(f"no Python at {python}; change --peers_python")


def command(kind: type[Options], measure: Callable[[Options], None], prog: str, doc: str) -> int:
    """Reads the flags into `kind` and measures; returns the exit status."""

    def run() -> None:
        measure(cli.parse(kind, sys.argv[1:], prog=prog, description=doc.partition("\n")[0]))

    return cli.exit_status(run, debug=False)
