"""All that is asked of one GPU for as long as it is lent, the most important first.

    python -m benchmarks.gpu --output DIR --manual_dir path/to/mnist --budget_minutes 25

A part is one or several commands of this repository, each in a process of its own, as what holds an
accelerator keeps its memory from others. After each command DIR holds what is known by then:
`gpu.json`, in the schema of `benchmarks.results`; `summary.md`, which holds it against the targets;
and in a folder of the part's name what the command wrote and said. A command that fails, or is
expected to take longer than what is left of the budget, is named with the reason and left out, and
the rest goes on. One that takes far longer than expected is ended; of a benchmark, what it had
written by then counts. In a DIR with earlier findings, parts that are not asked for stay.

Needs no network and no tensorflow-datasets. With --platform=cpu --short it all runs on a CPU, with
the smallest network on the digits: to try the plan, not to measure.
"""

import dataclasses
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks import __main__ as suite
from benchmarks import budget, launch, peers, roofline, step, targets, time_to_accuracy
from benchmarks.budget import Command
from benchmarks.results import Recorder
from mnist_jax.errors import DeviceError, UsageError

Part = Literal[
    "accuracy",
    "epoch",
    "peers",
    "time_to_accuracy",
    "seeds",
    "recipes",
    "deterministic",
    "suite",
]
PARTS: tuple[Part, ...] = get_args(Part)
FILE, SUMMARY = "gpu.json", "summary.md"
SHORT_MINUTES = 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    output: Path = Path("gpu")
    """Folder for the findings."""
    budget_minutes: float = 25.0
    """What all of it may take."""
    parts: tuple[Part, ...] = PARTS
    """Parts to measure."""
    dataset: str = "mnist"
    """The images: mnist, fashion_mnist, kmnist, or digits."""
    precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16"
    """Precision of what is trained, but for the part accuracy, which takes float32."""
    platform: Literal["gpu", "cpu"] = "gpu"
    """Device to run on; cpu only with --short."""
    short: bool = False
    """Try every part with the smallest network, a few steps and the digits."""

    def __post_init__(self):
        super().__post_init__()
        if not self.budget_minutes > 0:
            raise UsageError(
                f"budget_minutes is {self.budget_minutes}; allowed is any number above 0; "
                "change --budget_minutes"
            )
        if self.platform == "cpu" and not self.short:
            raise UsageError("--platform=cpu needs --short, for all of it would take a CPU days")


def plan(options: Options, data: dict[str, Any], scratch: Path) -> list[Command]:
    """The commands in their order; of the later parts, what can wait comes just before the suite.

    Args:
        options: the flags; `output` is absolute.
        data: the flags that name the data set.
        scratch: folder for runs, of which only result.json is kept.
    """
    short, output, on = options.short, options.output, {"platform": options.platform}
    where = types.SimpleNamespace(**on)
    cpu = options.platform == "cpu"
    exact: tuple[Any, ...] = ("float32",) if cpu else ("bfloat16", "tf32")
    net, small = ("logistic", "logistic") if short else ("cnn", "mlp")
    fast: dict[str, Any] = {"preset": "fast", "precision": exact[0] if cpu else options.precision}
    planned: list[Command] = []

    def add(part: Part, name: str, minutes: float, words: list[str], made: Path, **more: Any):
        minutes = SHORT_MINUTES if short else minutes
        planned.append(
            Command(part=part, name=name, minutes=minutes, words=words, made=made, **more)
        )

    def bench(part: Part, name: str, minutes: float, kind: Any, **fields: Any):
        file = output / part / f"{name}.json"
        words = ["-m", kind.__module__, *launch.words(kind(**on, **fields, output=file))]
        add(part, name, minutes, words, file, kind="results")

    def train(part: Part, name: str, minutes: float, kills: int = 0, **flags: Any):
        run = scratch / f"{part}-{name}"
        brief = {"epochs": 1} if short else {}
        asked = types.SimpleNamespace(**on, **data, **{**brief, **flags}, workdir=run)
        words = ["train.py", *launch.words(asked)]
        add(part, name, minutes, words, run / "result.json", kind="run", kills=kills)

    def recipe(preset: str, seed: int, minutes: float):
        more = fast | {"preset": preset, "seed": seed, "seeds": 2 if short else 10}
        train("recipes", f"{preset}-{seed}", minutes, model=net, **more)

    def vote(seed: int):
        run, name = scratch / f"recipes-best-{seed}", f"ensemble-{seed}"
        words = ["-m", "mnist_jax", "ensemble", str(run), "--json", *launch.words(where)]
        add("recipes", name, 0.4, words, output / "recipes" / f"{name}.out", kind="vote")

    def beside(precision: str, *models: str):
        who = ("flax",) if cpu else ("pytorch",)
        how: Any = {"rounds": 1, "what": ("train",), "frameworks": who, "precision": precision}
        bench("peers", f"{models[0]}-{precision}", 3, peers.Options, models=models, **how)

    def timed(part: Part, name: str, minutes: float, model: str, repeats: int, *goals: float):
        how: Any = {"model": (model,), "repeats": 2 if short else repeats, "targets": goals}
        bench(part, name, minutes, time_to_accuracy.Options, **how, **fast, **data)

    for model in dict.fromkeys(("logistic", small, net)):
        train("accuracy", model, 2 if model == "cnn" else 0.5, model=model, preset="tutorial")

    steps: Any = {"model": (net,), "repeats": 1 if short else 10}
    bench("epoch", "batch-100", 3, step.Options, precision=exact, what=("train",), **steps)
    large: Any = {"batch_size": (64 if short else 4096,), "precision": exact[:1]}
    bench("epoch", "batch-4096", 3, roofline.Options, **large, **steps)

    beside(exact[0], net)
    if not short:
        beside("float32", "mlp", "logistic")

    timed("time_to_accuracy", net, 2, net, 20, 0.99, 0.995)

    timed("seeds", f"{small}-alone", 1, small, 16, 0.975)
    for model in dict.fromkeys((small, net)):
        train("seeds", model, 0.8, model=model, seeds=2 if short else 16, **fast)

    recipe("fast", 1234, 1)
    recipe("best", 1234, 1.6)
    vote(1234)
    if not short:
        recipe("best", 1244, 1.6)
        vote(1244)

    same: Any = {"model": net, **fast, **({"epochs": 20} if short else {})}
    train("deterministic", "off", 0.5, **same)
    for name in ("once",) if short else ("once", "again"):
        train("deterministic", name, 0.6, **same, deterministic=True)
    often = {"steps_per_call": 5 if short else 100, "checkpoint_every": 0}
    train("deterministic", "killed", 4, 1 if short else 20, **same, **often, deterministic=True)

    if not short:
        beside("tf32", "cnn")
        for seed in (1244, 1254, 1264, 1274):
            recipe("fast", seed, 0.8)
        for seed in (1234, 1244):
            recipe("tutorial", seed, 1.4)

    some: Any = {"launches": 2, "repeats": 5}
    if short:
        some |= {"parts": ("lowering",), "model": ("logistic",)}
    asked = suite.Options(**on, **data, **some, output=output / "suite")
    add("suite", "card", 6, ["-m", "benchmarks", *launch.words(asked)], asked.output, kind="suite")
    return planned


def measure(options: Options) -> None:
    """Runs the plan, and writes what it found after each command."""
    ends = time.monotonic() + 60 * options.budget_minutes
    folder = options.output.expanduser().resolve()
    options = dataclasses.replace(options, output=folder)
    if options.short:
        options = dataclasses.replace(options, dataset="digits", manual_dir=None)
    try:
        context = launch.where(options.platform)
    except DeviceError as error:
        raise DeviceError(
            f"no {options.platform} can be used ({error}); "
            "--platform=cpu --short tries the plan on a CPU"
        ) from error
    data = options.prepare()
    more = {"dataset": data["dataset"], "short": options.short, "commands": {}, "seconds": {}}
    recorder = Recorder(folder / FILE, context | more)
    if (folder / FILE).exists():
        budget.keep_earlier(recorder, folder / FILE, options.parts)
    with tempfile.TemporaryDirectory() as scratch:
        variables = launch.keeping_compiled(scratch)
        recorder.context["variables"] = {**variables, **recorder.context["variables"]}
        for command in plan(options, data, Path(scratch)):
            if command.part in options.parts:
                left_s = ends - time.monotonic()
                budget.perform(command, recorder, folder / command.part, left_s, variables)
                recorder.write()
                (folder / SUMMARY).write_text(targets.summary(recorder.found))
    print(f"written: {folder}/{SUMMARY} and {FILE}")
    if not recorder.benchmarks and not recorder.tables:
        raise DeviceError("nothing could be measured; see what was left out, and why")


if __name__ == "__main__":
    # As an exception, so that the command under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(launch.command(Options, measure, "python -m benchmarks.gpu", __doc__ or ""))
