"""Starts the processes that are measured, describes the machine, and reads the flags."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jax

from benchmarks import results, timing
from benchmarks.results import Recorder, Results, say
from benchmarks.workers.job import HOST, KNOWN, MANY, ONE, Job
from mnist_jax.config import Config
from mnist_jax.data import DEFAULT_DATA_DIR, Dataset, load_dataset
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError, print_warnings
from mnist_jax.models import MODELS
from mnist_jax.parallel import mesh
from mnist_jax.runs import environment

ROOT = Path(__file__).resolve().parents[1]
SERVE = "from benchmarks.workers import job; job.serve()"
# What `malloc.tune_glibc` sets on a CPU, as variables: every framework's process has the same.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"}
MALLOC |= {"MALLOC_ARENA_MAX": "1"}
CACHE_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
NOT_INHERITED = (*CACHE_VARIABLES, "JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL")  # as in training
PLUGINS = ("jax-cuda", "libtpu", "nvidia-cudnn", "nvidia-cublas")  # names begin so
GPU_FIELDS = ("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem")
GPU_FIELDS += ("power.draw", "power.limit", "temperature.gpu", "clocks_event_reasons.active")


class ProcessError(MnistJaxError):
    """A process failed; the message is its last line, or the status it ended with."""

    def __init__(self, message: str, out: str = ""):
        super().__init__(message)
        self.out = out  # what it printed


def run(
    command: Sequence[str], variables: Mapping[str, str] = {}, *, timeout_s: float | None = None
) -> tuple[str, float]:
    """Runs a command in the repository's root; returns what it printed, and the seconds it took.

    JAX's cache of compiled programs is off unless `variables` name a folder for it. After
    `timeout_s` the process and its children are killed.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    pipe, started = subprocess.PIPE, time.perf_counter()
    settings: dict[str, Any] = {"cwd": ROOT, "stdout": pipe, "stderr": pipe, "text": True}
    settings["env"] = {**inherited, "PYTHONPATH": path, **variables}
    try:  # a session of its own can be killed as a whole
        process = subprocess.Popen(command, **settings, start_new_session=True)
    except OSError as error:
        raise ProcessError(f"cannot start {command[0]} ({error.strerror})") from error
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        out = ""
        for number in (signal.SIGTERM, signal.SIGKILL):  # by the first, a command ends its own
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                out, _ = process.communicate(timeout=5)
        if isinstance(error, subprocess.TimeoutExpired):
            raise ProcessError(f"not finished after {timeout_s:.0f} s", out) from None
        raise
    if code := process.returncode:
        status = f"exit status {code}{'; out of memory?' * (code == -signal.SIGKILL)}"
        said = err.partition("\n----")[0].strip().splitlines() * (code > 0)  # a signal leaves none
        raise ProcessError((said or [status])[-1].removeprefix("error: "), out)
    return out, time.perf_counter() - started


def measure(
    recorder: Recorder,
    function: str,
    what: str,
    *,
    variables: Mapping[str, str] = {},
    python: str | Path = sys.executable,
    prefix: str = "",
    details: Mapping[str, Any] = {},
    **arguments: Any,
) -> None:
    """Calls `module:function` in a process of its own and records the result file it returns.

    `prefix` and `details` are those of `Recorder.take_in`. If it fails, `what` is excluded.
    """
    if recorder.left_s() == 0:
        raise ProcessError("the time is up")
    command = [str(python), "-c", SERVE, function, json.dumps(arguments)]
    given = {**recorder.variables, **variables}
    given |= MALLOC if recorder.found.context["platform"] == "cpu" else {}
    try:
        out, _ = run(command, given, timeout_s=recorder.left_s())
    except ProcessError as error:
        recorder.exclude(what, str(error))
        out = error.out  # what was measured before counts
    if not (lines := re.findall(r'^\{"context": .*\}\n', out, re.MULTILINE)):
        recorder.found.context["excluded"].setdefault(what, "it printed no result")
    for line in lines[-1:]:
        found = results.parse(json.loads(line))
        recorder.take_in(found, prefix, **details)
        for b, _, [s, *_] in found._replace(context=recorder.found.context).cases():
            say(f"{b.case}: {1e3 * s:.4g} ms {timing.warning(b.samples_s)}")
    recorder.write()


def measure_jobs(recorder: Recorder, jobs: Sequence[Job], worker: str = "", **options: Any) -> None:
    """Does jobs in one process, in this order, by this project or by that module of `workers`."""
    options["cases"] = [dataclasses.asdict(job) for job in jobs]
    options |= {"make": f"benchmarks.workers.{worker}:make"} if worker else {}
    function = "benchmarks.workers.job:run_all" if worker else "benchmarks.workers.ours:run"
    measure(recorder, function, "; ".join(job.name for job in jobs), **options)


def shared_cache(folder: str | Path) -> dict[str, str]:
    """Variables by which processes read each other's compiled programs."""
    return dict(zip(CACHE_VARIABLES, (f"{folder}/compiled", "0"), strict=True))


def where(platform: str) -> dict[str, Any]:
    """The answer of `describe`, from a process that then releases the device."""
    question = json.dumps({"platform": platform})
    try:
        out, _ = run([sys.executable, "-c", SERVE, "benchmarks.launch:describe", question])
    except ProcessError as error:  # the platform is absent
        raise DeviceError(str(error).rpartition("Error: ")[2]) from error
    return json.loads(out.splitlines()[-1])


def describe(platform: str) -> dict[str, Any]:
    """What a time depends on: the environment, the plugins, the load, the GPU's state."""
    device = mesh.select_device(platform)
    found = {d.name: d.version for d in distributions() if d.name.startswith(PLUGINS)}
    gpu = gpu_state() if device.platform == "gpu" else None
    limits = {name: gpu[name] for name in ("power.limit", "clocks.max.sm")} if gpu else {}
    context = environment.describe(device) | {"plugins": found, "load": os.getloadavg()}
    context["variables"] |= MALLOC if device.platform == "cpu" else {}
    return context | {"gpu": gpu} | limits


def gpu_state() -> dict[str, Any] | None:
    """What nvidia-smi says of the GPU in use: clocks, power, throttling, others' processes."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"

    def query(kind: str, fields: Sequence[str]) -> list[list[str]]:
        words = f"nvidia-smi --id={which} --format=csv,noheader --query-{kind}={','.join(fields)}"
        try:
            return [x.split(", ") for x in run(words.split(), timeout_s=20)[0].splitlines()]
        except ProcessError:
            return []

    if not (rows := [row for row in query("gpu", GPU_FIELDS) if len(row) == len(GPU_FIELDS)]):
        return None
    others = {row[0] for row in query("compute-apps", ["pid"])} - {str(os.getpid())}
    found = {"processes": sum(map(str.isdecimal, others))}  # there may be a message in their place
    return found | dict(zip(GPU_FIELDS, rows[0], strict=True))


def _dataset(options: argparse.Namespace) -> Dataset:
    own = {name: vars(options)[name] for name in ("fork", "options", "dataset")}
    own = Config(model=options.model[0], **own).arguments("dataset")
    folders = {"data_dir": options.data_dir, "manual_dir": options.manual_dir}
    return load_dataset(options.dataset, **folders, **own)


def flags_of_data(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of fork and data set for a run of `train.py`; prepares it before any clock runs."""
    found = _dataset(options)
    print_warnings(found.warnings)
    name = found.name if options.dataset == "auto" else options.dataset
    given = {"fork": options.fork, "options": options.options, "dataset": name}
    return {n: v for n, v in given.items() if v} | {"data_dir": options.data_dir}


def random_images(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a job that say what its images are like; MNIST's unless --dataset is given."""
    found: dict[str, Any] = {n: vars(options)[n] for n in ("fork", "options", "dataset")}
    if options.dataset != "auto":
        data = _dataset(options)
        most = max(len(data.train.label), *options.batch_size)
        found |= {"train_size": most, "test_size": len(data.test.label)}
        found |= {"image_shape": data.spec.image_shape, "num_classes": data.spec.num_classes}
    return found


def _one(help: str, default: Any = None, type: Any = None, **more: Any) -> dict[str, Any]:
    return {"help": help, "default": default, "type": type, "metavar": "X", **more}


_several = partial(_one, nargs="+")
MODES = {"many": MANY, "one": ONE, "host": HOST, "seeds": MANY}
TIMED, PLATFORMS = ("train", "eval"), ("auto", "cpu", "gpu", "tpu")
PARTS = ("step", "peers", "roofline", "sweep", "time_to_accuracy", "seeds", "ledger", "lowering")
PRECISIONS, FRAMEWORKS = ("float32", "tf32", "bfloat16"), ("flax", "pytorch", "keras")
FLAGS: dict[str, Any] = {
    "output": _one("result file in JSON, or the suite's folder", type=Path),
    "model": _several("networks to measure", list(MODELS)),
    "fork": _one("Python file that adds models or data sets"),
    "options": _several("keyword arguments of the model or of the fork's parts, as gamma=3", ()),
    "batch_size": _several("images a training step", [100], int),
    "precision": _several("precision of products", ["float32"], choices=PRECISIONS),
    "platform": _one("auto is the best that JAX finds", "auto", choices=PLATFORMS),
    "repeats": _one("samples of each case, at most; in time_to_accuracy, seeds", 60, int),
    "launches": _one("processes that measure each case", 1, int),
    "rounds": _one("how often everything runs", 9, int),
    "mode": _several("how steps are called", ["many", "one"], choices=MODES),
    "what": _several("a training step, an evaluation of the test images", TIMED, choices=TIMED),
    "trace": {"action": "store_true", "help": "count the kernels of a step"},
    "slow_down": _one("share of the training steps done twice", 0.0, float),
    "devices": _several("numbers of devices (default: 2, 4, 8 and so on, and all)", None, int),
    "dataset": _one("name or path of a data set; auto: mnist, or digits without it", "auto"),
    "data_dir": _one("folder of prepared data sets", DEFAULT_DATA_DIR, Path),
    "manual_dir": _one("folder with the data set's four original .gz files", type=Path),
    "preset": _one("the recipe, with its epochs", "tutorial"),
    "frameworks": _several("peers", FRAMEWORKS, choices=FRAMEWORKS),
    "modes": _several("modes of the peers (default: all)", choices=KNOWN),
    "peers_python": _one("interpreter that has the peers", Path(sys.executable), Path),
    "budget_minutes": _one("for all parts (default: 4 on a CPU, 13 elsewhere)", None, float),
    "only": _several("parts to measure, by default all", choices=PARTS),
    "files": {"nargs": "*", "metavar": "FILE", "help": "two result files or cards, A and B"},
    "run": {"nargs": 2, "metavar": "COMMAND", "help": "two commands that measure"},
    "threshold": _one("share by which B may be slower", 0.02, float),
    "across_devices": {"action": "store_true", "help": "compare different devices"},
    "self_test": {"action": "store_true", "help": "test the verdicts, on the first --model"},
}
DEFAULTS = {name: flag.get("default") for name, flag in FLAGS.items()}
FORK = "fork options dataset data_dir manual_dir"
ONE_CASE = "output model batch_size=1 precision=1 platform"  # of two flags one value
CASES = f"{ONE_CASE.replace('=1', '')} repeats {FORK}"


def check(options: argparse.Namespace) -> None:
    """Loads the fork, makes paths absolute, and refuses what no command can do."""
    counts = [options.launches, options.repeats, options.rounds]
    counts += [*(options.batch_size or ()), *(options.devices or ())]
    if min(counts) < 1 or not all(0 <= x < 1 for x in (options.threshold, options.slow_down)):
        raise UsageError("numbers are 1 or more; --threshold and --slow_down are from 0 to below 1")
    given = {n: vars(options)[n] for n in ("fork", "options", "dataset", "preset", "data_dir")}
    for model in options.model:
        config = Config(model=model, **given).resolve()
        options.dataset, options.data_dir = config.dataset, str(config.data_dir.absolute())
        options.fork = config.fork and str(config.fork.absolute())
        options.flags = {n: config.hyperparameters()[n] for n in ("fork", "options", "dataset")}


def main(
    doc: str | None,
    command: Callable[..., Recorder | None],
    names: str,
    report: Callable[[Results], Sequence[str]] | None = None,
    **defaults: Any,
) -> int:
    """Runs a command with these flags and, if it has a report, a recorder; returns the status."""
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    parser.prog = f"python -m benchmarks.{Path(sys.argv[0]).stem}".removesuffix(".__main__")
    for name, _, count in (word.partition("=") for word in names.split()):
        flag, default = FLAGS[name] | ({"nargs": 1} if count else {}), (DEFAULTS | defaults)[name]
        words = map(str, default if isinstance(default, list | tuple) else [default])
        notes = ["; ".join(flag.get("choices", ())), f"default: {' '.join(words)}" * bool(default)]
        text: Any = f"{flag['help']} ({') ('.join(filter(None, notes))})".removesuffix(" ()")
        parser.add_argument(name if name == "files" else f"--{name}", **flag | {"help": text})
    parser.set_defaults(**DEFAULTS | defaults)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: `run` ends its process
    try:
        check(options)
        if report is None:
            recorder = command(options)
        else:
            recorder = Recorder(options.output, where(options.platform) | {"flags": options.flags})
            options.platform = recorder.found.context["platform"]
            command(options, recorder)
            recorder.write()
            lost = [f"excluded: {k}: {v}" for k, v in recorder.found.context["excluded"].items()]
            print("\n\n".join(filter(None, [*report(recorder.found), *lost])))
        if recorder is not None and not recorder.found.size:
            raise DeviceError("nothing could be measured; see the messages above")
    except MnistJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0
