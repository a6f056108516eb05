"""Starts the processes that are measured, and the commands that measure them."""

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from mnist_jax import cli
from mnist_jax.data import DEFAULT_DATA_DIR, load_dataset
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError
from mnist_jax.ops import malloc as memory
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment

ROOT = Path(__file__).resolve().parents[1]
Kind = TypeVar("Kind")
Model = Literal["logistic", "mlp", "cnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags that the parts of the suite share."""

    output: Path | None = None
    """Result file, in JSON. None: only print."""
    model: tuple[Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to measure."""
    batch_size: tuple[int, ...] = (100,)
    """Images a training step; one or several."""
    precision: tuple[Literal["float32", "tf32", "bfloat16"], ...] = ("float32",)
    """Precision of products; one or several."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Device to run on; auto: the best that JAX finds."""
    repeats: int = 20
    """Samples of each thing measured; fewer where those taken last 1.5 s."""

    def __post_init__(self):
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The flags of what trains on a data set."""

    output: Path | None = None
    """Result file, in JSON. None: only print."""
    dataset: str = "auto"
    """The images: mnist, fashion_mnist, kmnist, digits, or auto: mnist where it can be had,
    otherwise digits."""
    data_dir: Path = DEFAULT_DATA_DIR
    """Folder where prepared and decoded data sets are kept."""
    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def __post_init__(self):
        check_options(self)

    def prepare(self) -> dict[str, Any]:
        """Has the data set prepared and decoded before any clock runs.

        Returns:
            The flags that name it from then on.

        Raises:
            DataError: it cannot be had.
        """
        data_dir = self.data_dir.expanduser().resolve()
        found = load_dataset(self.dataset, data_dir=data_dir, manual_dir=self.manual_dir)
        for notice in found.warnings:
            say(f"notice: {notice}")
        return {"dataset": found.name, "data_dir": data_dir}


class ProcessError(MnistJaxError):
    """A measured process failed; the message is its last line, or the status it ended with."""


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


ON_CPU = {"JAX_PLATFORMS": "cpu"}  # where the peers run too


def python_path() -> str:
    """This repository before what PYTHONPATH names already."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def run(python: Path, arguments: Sequence[str], variables: Mapping[str, str] = ON_CPU) -> Finished:
    """Runs Python with these arguments and environment variables in the repository's root.

    Raises:
        ProcessError: it did not exit with 0.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(), **variables}
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
        # An error's class says less than its message, but for those that Python itself raises.
        raise ProcessError(re.sub(r"^(ModuleNotFoundError|mnist_jax\.errors\.\w+): ", "", last))
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


def words(options: Any) -> list[str]:
    """The command-line words that make these options."""
    made = []
    for name, value in vars(options).items():
        if value == ():
            continue
        if isinstance(value, tuple):
            made += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no_{name}")
        elif value is not None:
            made.append(f"--{name}={value}")
    return made


def keeping_compiled(folder: str) -> dict[str, str]:
    """Variables by which processes keep compiled programs there for each other."""
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def part(module: str, options: Any, variables: Mapping[str, str] | None = None) -> None:
    """Runs a command of this folder in a process of its own; what it says on stderr is seen.

    Args:
        module: the command's.
        options: its flags.
        variables: environment variables, where the environment does not set them.

    Raises:
        ProcessError: it did not exit with 0.
    """
    command = [sys.executable, "-m", module, *words(options)]
    environment = {**(variables or {}), **os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        error = ProcessError(f"{module} ended with status {done.returncode}; see what it said")
        error.exit_status = max(done.returncode, 1)
        raise error


def ask(
    python: Path, module: str, question: Mapping[str, Any], variables: Mapping[str, str] = ON_CPU
) -> Finished:
    """Runs `module` with the question as JSON; its output is the JSON on its last line."""
    done = run(python, ["-m", module, json.dumps(question)], variables)
    return done._replace(output=json.loads(done.output.splitlines()[-1]))


def where(platform: str) -> dict[str, Any]:
    """What `environment.describe` says of a platform's device; auto: of the best that JAX finds.

    An accelerator is asked in a process of its own: what holds one keeps its memory from others.

    Raises:
        DeviceError: the platform is absent.
    """
    if platform == "cpu":
        return environment.describe(devices.select_device(platform))
    question = {"platform": platform}
    try:
        return ask(Path(sys.executable), "benchmarks.peer_workers.where", question, {}).output
    except ProcessError as error:
        raise DeviceError(str(error)) from error


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(parts: Iterable[Table | str]) -> None:
    """Prints tables and lines; where no terminal limits their width, whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    for part in parts:
        console.print(part, markup=False)


def check_options(options: Any) -> None:
    """Refuses numbers below 1 and an interpreter that is not there."""
    for name, value in vars(options).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number < 1:
                raise UsageError(f"{name} is {number}; allowed is 1 or more; change --{name}")
    python = getattr(options, "peers_python", None)
    if python is not None and not python.is_file():
        raise UsageError(f"no Python at {python}; change --peers_python")


def command(kind: type[Kind], measure: Callable[[Kind], None], prog: str, doc: str) -> int:
    """Reads the flags into `kind` and measures; returns the exit status."""

    def run() -> None:
        memory.tune_glibc()  # as train.py does
        argv = [word for word in sys.argv[1:] if word != "--debug"]
        measure(cli.parse(kind, argv, prog=prog, description=doc.partition("\n")[0]))

    return cli.exit_status(run, debug="--debug" in sys.argv)
