"""Starts the processes that are measured, describes the machine, and reads the flags."""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import results, timing
from benchmarks.results import Recorder, Results, say
from benchmarks.workers.job import HOST, MANY, ONE, Job
from mnist_jax.config import PRESETS
from mnist_jax.data import DEFAULT_DATA_DIR, load_dataset
from mnist_jax.errors import DeviceError, MnistJaxError
from mnist_jax.models import MODELS
from mnist_jax.parallel import mesh
from mnist_jax.runs import environment

ROOT = Path(__file__).resolve().parents[1]
SERVE = "from benchmarks import workers; workers.serve()"
# What `malloc.tune_glibc` sets, as variables, so that every framework's process has the same.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
}
CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "nvidia-cudnn-cu12")
PLUGINS += ("nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas")
GPU_FIELDS = ("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem")
GPU_FIELDS += ("power.draw", "power.limit", "temperature.gpu", "utilization.gpu", "memory.used")


class ProcessError(MnistJaxError):
    """A measured process failed; the message is its last line, or the status it ended with."""


class OutOfTimeError(MnistJaxError):
    """A process did not end in time."""


def run(
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    *,
    timeout_s: float = math.inf,
) -> tuple[str, float]:
    """Runs a command in the repository's root; returns what it printed, and the seconds it took.

    JAX's cache of compiled programs is off unless `variables` name a folder for it.

    Raises:
        ProcessError: it did not start, or did not exit with 0.
        OutOfTimeError: it was killed, with its children, after `timeout_s`.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {k: v for k, v in os.environ.items() if k not in CACHE_VARIABLES}
    pipe, started = subprocess.PIPE, time.perf_counter()
    settings: dict[str, Any] = {"cwd": ROOT, "stdout": pipe, "stderr": pipe, "text": True}
    settings["env"] = {**inherited, **MALLOC, "PYTHONPATH": path, **(variables or {})}
    try:  # a session of its own can be killed as a whole
        process = subprocess.Popen(command, **settings, start_new_session=True)
    except OSError as error:
        raise ProcessError(f"cannot start {command[0]} ({error.strerror})") from error
    try:
        out, err = process.communicate(timeout=None if timeout_s == math.inf else timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise OutOfTimeError(f"not finished after {timeout_s:.0f} s") from None
        raise
    if process.returncode:
        status = f"exit status {process.returncode}"
        raise ProcessError((err.strip().splitlines() or [status])[-1].removeprefix("error: "))
    return out, time.perf_counter() - started


def measure(
    recorder: Recorder,
    function: str,
    what: str,
    *,
    variables: Mapping[str, str] | None = None,
    python: str | Path = sys.executable,
    prefix: str = "",
    details: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """Calls `module:function` in a process of its own and records the result file it returns.

    The arguments are JSON. The recorder sets the time limit and, besides `variables`, the
    environment; `prefix` and `details` are those of `Recorder.take_in`. If the process fails,
    `what` is excluded.
    """
    command = [str(python), "-c", SERVE, function, json.dumps(arguments)]
    variables = recorder.variables | dict(variables or {})
    try:
        out, _ = run(command, variables, timeout_s=recorder.left_s())
    except ProcessError as error:
        recorder.exclude(what, str(error))
    else:
        found = results.parse(json.loads(out.splitlines()[-1]))
        recorder.take_in(found, prefix, **(details or {}))
        for b in found.benchmarks:
            seconds = timing.estimate(b.samples_s, recorder.found.platform)
            say(f"{b.case}: {1e3 * seconds:.4g} ms {timing.warning(b.samples_s)}")
        for name, why in found.context.get("excluded", {}).items():
            say(f"excluded: {name}: {why}")
    recorder.write()


def measure_jobs(
    recorder: Recorder,
    jobs: Sequence[Job],
    make: str = "",
    **options: Any,
) -> None:
    """Does jobs in one process, in this order: this project's, or what `make` makes of them."""
    options["cases"] = [dataclasses.asdict(job) for job in jobs]
    what = "; ".join(job.name for job in jobs)
    if make:
        measure(recorder, "benchmarks.workers.job:run_all", what, make=make, **options)
    else:
        measure(recorder, "benchmarks.workers.ours:run", what, **options)


def shared_cache(folder: str | Path) -> dict[str, str]:
    """Variables by which processes read each other's compiled programs."""
    return dict(zip(CACHE_VARIABLES, (f"{folder}/compiled", "0"), strict=True))


def where(platform: str) -> dict[str, Any]:
    """What a time depends on: `environment.describe`, the plugins, the load, the GPU's state.

    Found by a process that then releases the device.

    Raises:
        DeviceError: the platform is absent.
    """
    question = json.dumps({"platform": platform})
    try:
        out, _ = run([sys.executable, "-c", SERVE, "benchmarks.launch:describe", question])
        return json.loads(out.splitlines()[-1])
    except ProcessError as error:
        raise DeviceError(str(error).rpartition("Error: ")[2]) from error


def describe(platform: str) -> dict[str, Any]:
    """The answer to `where`; takes the device."""
    device = mesh.select_device(platform)
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PLUGINS}
    context = environment.describe(device) | {"plugins": found, "load": os.getloadavg()}
    return context | {"gpu": gpu_state() if device.platform == "gpu" else None}


def gpu_state() -> dict[str, Any] | None:
    """What nvidia-smi says of the first GPU: clocks, power, throttling, other processes."""

    def query(kind: str, fields: Sequence[str]) -> list[list[str]]:
        words = ["nvidia-smi", f"--query-{kind}={','.join(fields)}", "--format=csv,noheader"]
        try:
            out = subprocess.check_output(words, text=True, timeout=20, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError):
            return []
        return [[cell.strip() for cell in line.split(",")] for line in out.splitlines()]

    if not (rows := query("gpu", GPU_FIELDS)):
        return None
    [throttled] = query("gpu", ["clocks_event_reasons.active"])[:1] or [["unknown"]]
    found = dict(zip(GPU_FIELDS, rows[0], strict=True)) | {"throttle_reasons": throttled[0]}
    return found | {"processes": len(query("compute-apps", ["pid"]))}


def prepare_data(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares the data set before any clock runs; returns the flags that name it from then on."""
    data_dir = options.data_dir.expanduser().resolve()
    found = load_dataset(options.dataset, data_dir=data_dir, manual_dir=options.manual_dir)
    for warning in found.warnings:
        say(f"warning: {warning}")
    return {"dataset": found.name, "data_dir": str(data_dir)}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a whole number, 1 or more")
    return int(text)


def _one(help: str, default: Any = None, type: Any = None, **more: Any) -> dict[str, Any]:
    return {"help": help, "default": default, "type": type, **more}


def _several(help: str, default: Any = None, type: Any = None, **more: Any) -> dict[str, Any]:
    return _one(help, default, type, nargs="+", **more)


MODES = {"many": MANY, "one": ONE, "host": HOST, "seeds": MANY}
TIMED, PLATFORMS = ("train", "eval"), ("auto", "cpu", "gpu", "tpu")
PARTS = ("step", "peers", "roofline", "sweep", "time_to_accuracy", "seeds", "ledger", "lowering")
PRECISIONS, FRAMEWORKS = ("float32", "tf32", "bfloat16"), ("flax", "pytorch", "keras")
FLAGS: dict[str, dict[str, Any]] = {
    "output": _one("result file in JSON, or the suite's folder", type=Path),
    "model": _several("networks to measure", list(MODELS), choices=MODELS),
    "batch_size": _several("images a training step", [100], _count),
    "precision": _several("precision of products", ["float32"], choices=PRECISIONS),
    "platform": _one("device; auto: the best JAX finds", "auto", choices=PLATFORMS),
    "repeats": _one("samples of each case, fewer above 1.5 s; or seeds", 20, _count),
    "launches": _one("processes that measure each case", 1, _count),
    "rounds": _one("how often everything runs", 5, _count),
    "mode": _several("how steps are called", ["many", "one"], choices=MODES),
    "what": _several("a training step, an evaluation of 10,000 images", TIMED, choices=TIMED),
    "trace": {"action": "store_true", "help": "count the kernels of a step"},
    "slow_down": _one("share of the training steps done twice", 0.0, float),
    "devices": _several("numbers of devices; None: 2, 4, 8 and so on, and all", None, _count),
    "dataset": _one("data set to train on; auto: mnist, or digits without it", "auto"),
    "data_dir": _one("folder of prepared data sets", DEFAULT_DATA_DIR, Path),
    "manual_dir": _one("folder with the data set's four original .gz files", type=Path),
    "preset": _one("the recipe, with its epochs", "tutorial", choices=PRESETS),
    "frameworks": _several("peers", FRAMEWORKS, choices=FRAMEWORKS),
    "modes": _several("only these modes of the peers; None: all"),
    "peers_python": _one("interpreter that has the peers", Path(sys.executable), Path),
    "budget_minutes": _one("time for all parts; None: 4 on a CPU, 9 elsewhere", None, float),
    "only": _several("parts to measure; None: all", choices=PARTS),
    "files": {"nargs": "*", "metavar": "FILE", "help": "two result files or cards, A and B"},
    "run": {"nargs": 2, "metavar": "COMMAND", "help": "two commands that measure"},
    "threshold": _one("share by which B may be slower", 0.02, float),
    "across_devices": {"action": "store_true", "help": "compare different devices"},
    "self_test": {"action": "store_true", "help": "test the verdicts, on the first --model"},
}
DEFAULTS = {name: flag.get("default") for name, flag in FLAGS.items()}
CASES = "output model batch_size precision platform repeats"
DATA = "dataset data_dir manual_dir"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(
    doc: str | None,
    command: Callable[..., None],
    names: str,
    report: Callable[[Results], Sequence[str]] | None = None,
    **defaults: Any,
) -> int:
    """Runs a command with the flags of these names; returns the exit status.

    The command takes options, which have every flag, and a recorder if there is a report to print.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)
    for name in names.split():
        parser.add_argument(name if name == "files" else f"--{name}", **FLAGS[name])
    parser.set_defaults(**DEFAULTS | defaults)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to others
    try:
        if report is None:
            command(options)
        else:
            recorder = Recorder(options.output, where(options.platform))
            options.platform = recorder.found.platform
            command(options, recorder)
            recorder.finish(report)
    except MnistJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0
