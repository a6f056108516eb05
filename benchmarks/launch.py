"""Starts the processes that are measured, describes the machine, and reads the flags."""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import say
from mnist_jax.config import PRESETS
from mnist_jax.data import DEFAULT_DATA_DIR, load_dataset
from mnist_jax.errors import DeviceError, MnistJaxError, unknown_choice
from mnist_jax.models import MODELS
from mnist_jax.ops import malloc
from mnist_jax.parallel import mesh
from mnist_jax.runs import environment

ROOT = Path(__file__).resolve().parents[1]
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


def run(
    command: Sequence[str],
    variables: Mapping[str, str] | None = None,
    *,
    timeout_s: float | None = None,
    show: bool = False,
) -> tuple[str, float]:
    """Runs a command in the repository's root; returns what it printed, and the seconds it took.

    JAX's cache of compiled programs is off unless `variables` name a folder for it.

    Args:
        command: the program and its arguments.
        variables: environment variables to set.
        timeout_s: kill the process and its children after so long.
        show: pass its stderr through.

    Raises:
        ProcessError: it did not exit with 0 in time.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {k: v for k, v in os.environ.items() if k not in CACHE_VARIABLES}
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        start_new_session=timeout_s is not None,  # a group of its own, to be killed as a whole
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException as error:
            if timeout_s is not None:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ProcessError(f"not finished after {timeout_s:.0f} s") from None
            raise
    wall_s = time.perf_counter() - started
    if process.returncode:
        last = ((err or "").strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        # The class of an error says less than its message.
        raise ProcessError(re.sub(r"^(error|ModuleNotFoundError|mnist_jax\S+): ", "", last))
    return out, wall_s


def ask(
    module: str,
    question: Mapping[str, Any],
    variables: Mapping[str, str] | None = None,
    python: str | Path = sys.executable,
) -> Any:
    """Runs `module` with the question as JSON; returns the JSON on its last line."""
    out, _ = run([str(python), "-m", module, json.dumps(question)], variables)
    return json.loads(out.splitlines()[-1])


def command(module: str, options: Mapping[str, Any]) -> list[str]:
    """The command that runs a module with these flags; None and False are left out."""
    words = [sys.executable, "-m", module]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")
    return words


def shared_cache(folder: str | Path) -> dict[str, str]:
    """Variables by which processes read each other's compiled programs."""
    return dict(zip(CACHE_VARIABLES, (f"{folder}/compiled", "0"), strict=True))


def describe(device: Any) -> dict[str, Any]:
    """What a time depends on: `environment.describe`, the plugins, the load, the GPU's state."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PLUGINS}
    gpu = _gpu() if device.platform == "gpu" else None
    return environment.describe(device) | {"plugins": found, "load": os.getloadavg(), "gpu": gpu}


def _gpu() -> dict[str, Any] | None:
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
    throttled = query("gpu", ["clocks_event_reasons.active"]) or [["unknown"]]
    found = dict(zip(GPU_FIELDS, rows[0], strict=True))
    processes = len(query("compute-apps", ["pid"]))
    return found | {"throttle_reasons": throttled[0][0], "processes": processes}


def where(platform: str) -> dict[str, Any]:
    """`describe` of a platform's device, from a process that then releases the device.

    Raises:
        DeviceError: the platform is absent.
    """
    try:
        return ask("benchmarks.launch", {"platform": platform})
    except ProcessError as error:
        raise DeviceError(str(error)) from error


def prepare_data(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares the data set before any clock runs; returns the flags that name it from then on."""
    data_dir = options.data_dir.expanduser().resolve()
    found = load_dataset(options.dataset, data_dir=data_dir, manual_dir=options.manual_dir)
    for warning in found.warnings:
        say(f"warning: {warning}")
    return {"dataset": found.name, "data_dir": str(data_dir)}


def _model(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(str(unknown_choice("model", text, MODELS)))
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is a whole number, 1 or more")
    return int(text)


def _python(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no Python at {text}")
    return Path(text)


def _one(help: str, default: Any = None, type: Any = None, **more: Any) -> dict[str, Any]:
    return {"help": help, "default": default, "type": type, **more}


def _several(help: str, default: Any = None, type: Any = None, **more: Any) -> dict[str, Any]:
    return _one(help, default, type, nargs="+", **more)


def _switch(help: str) -> dict[str, Any]:
    return {"help": help, "action": "store_true"}


MODES = ("many", "one", "host", "seeds")
TIMED, PLATFORMS = ("train", "eval"), ("auto", "cpu", "gpu", "tpu")
PRECISIONS = ("float32", "tf32", "bfloat16")
PEERS = ("flax", "pytorch", "keras")
FLAGS: dict[str, dict[str, Any]] = {
    "output": _one("result file in JSON, or the suite's folder", type=Path),
    "model": _several("networks to measure", list(MODELS), _model),
    "batch_size": _several("images a training step", [100], _count),
    "precision": _several("precision of products", ["float32"], choices=PRECISIONS),
    "platform": _one("device; auto: the best JAX finds", "auto", choices=PLATFORMS),
    "repeats": _one("samples of each case, fewer above 1.5 s; or seeds", 20, _count),
    "launches": _one("processes that measure each case", 1, _count),
    "rounds": _one("how often everything runs", 5, _count),
    "mode": _several(
        "how steps are called", ["many", "one"], choices=("many", "one", "host", "seeds")
    ),
    "what": _several("a training step, an evaluation of 10,000 images", TIMED, choices=TIMED),
    "seeds": _one("networks of the mode seeds", 16, _count),
    "trace": _switch("count the kernels of a step"),
    "trace_dir": _one("with --trace: keep the trace in this folder", type=Path),
    "slow_down": _one("share of the training steps done twice", 0.0, float),
    "devices": _several("numbers of devices; None: 2, 4, 8 and so on, and all", None, _count),
    "dataset": _one("data set to train on; auto: mnist, or digits without it", "auto"),
    "data_dir": _one("folder of prepared data sets", DEFAULT_DATA_DIR, Path),
    "manual_dir": _one("folder with the data set's four original .gz files", type=Path),
    "epochs": _one("passes over the training images", 3, _count),
    "preset": _one("the recipe, with its epochs", "tutorial", choices=PRESETS),
    "targets": _several("shares of test images to get right; None: the network's", None, float),
    "frameworks": _several(
        "peers", ["flax", "pytorch", "keras"], choices=("flax", "pytorch", "keras")
    ),
    "modes": _several("only these modes of the peers; None: all"),
    "peers_python": _one("interpreter that has the peers", Path(sys.executable), _python),
    "budget_minutes": _one("time for all parts; None: 4 on a CPU, 9 elsewhere", None, float),
    "only": _several("parts to measure; None: all"),
    "files": {"nargs": "*", "metavar": "FILE", "help": "two result files or cards, A and B"},
    "run": {"nargs": 2, "metavar": "COMMAND", "help": "two commands that measure"},
    "folder": _one("folder in which --run leaves A.json and B.json", type=Path),
    "threshold": _one("share by which B may be slower", 0.02, float),
    "across_devices": _switch("compare files of different devices"),
    "self_test": _switch("test the verdicts, on the first --model"),
    "comparisons": _one("comparisons of --self_test, of either kind", 20, _count),
    "again": _one("with --self_test: judge this file's samples anew", type=Path),
}
CASES = "output model batch_size precision platform repeats"
DATA = "dataset data_dir manual_dir"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(
    doc: str | None, measure: Callable[[argparse.Namespace], None], names: str, **defaults: Any
) -> int:
    """Parses the flags of these names and measures; returns the exit status.

    An error of ours is one line on stderr.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)
    for name in names.split():
        parser.add_argument(name if name == "files" else f"--{name}", **FLAGS[name])
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    malloc.tune_glibc()  # as train.py does
    try:
        measure(options)
    except MnistJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    try:
        print(json.dumps(describe(mesh.select_device(json.loads(sys.argv[1])["platform"]))))
    except DeviceError as failure:
        sys.exit(str(failure))
