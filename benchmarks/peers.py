"""Times training and evaluation here and in plain Flax, PyTorch and Keras, interleaved.

    python -m benchmarks.peers --models logistic mlp cnn --output FILE

Same network, batch, precision and optimizer; what is inside the clock stands in
`benchmarks.peer_workers.job`. In each round every framework runs once, in a process of its own
with all cores, in an order that rotates; ratios are taken within a round, so that a machine that
slows down between rounds slows both sides. A framework that is not installed, or fails, is named
and left out.

With --platform=gpu the peer is PyTorch, whose images lie on the GPU too, in the same --precision:
float32, TF32, or bfloat16 by autocast.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import launch, step, timing
from benchmarks.peer_workers.job import Job
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.errors import UsageError

NAMES = {"train": step.TRAIN, "eval": step.EVALUATION}
PRECISION = "float32"
BUSY = 0.05  # a share of the processor for other processes above this brings a warning


class Contender(NamedTuple):
    """A framework in one of its modes; `worker` is the module that knows both."""

    framework: str
    mode: str
    worker: str
    what: tuple[str, ...] = ("train", "eval")


OURS = Contender("mnist_jax", "many steps a call", "ours")
PEERS = (
    Contender("flax", "one dispatch a step", "plain_flax"),
    Contender("pytorch", "eager", "pytorch"),
    Contender("pytorch", "eager, fused Adam", "pytorch", ("train",)),  # evaluates as the other
    Contender("pytorch", "torch.compile", "pytorch"),
    Contender("keras", "jit_compile=False", "tf_keras"),
    Contender("keras", "jit_compile=True", "tf_keras"),
)


ON_GPU = (
    Contender("pytorch", "eager", "pytorch"),
    Contender("pytorch", "eager, fused Adam", "pytorch", ("train",)),
    Contender("pytorch", "torch.compile, CUDA graphs", "pytorch"),
    Contender("pytorch", "torch.compile, max-autotune", "pytorch"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags."""

    output: Path
    """Result file, in JSON."""
    models: tuple[launch.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to measure."""
    rounds: int = 5
    """How often every framework is run."""
    batch_size: int = 100
    """Images a training step."""
    what: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    """A training step, the evaluation of 10,000 images, or both."""
    frameworks: tuple[Literal["flax", "pytorch", "keras"], ...] = ("flax", "pytorch", "keras")
    """Whom to measure beside this project."""
    peers_python: Path = Path(sys.executable)
    """Python interpreter that PyTorch and Keras are installed for."""
    platform: Literal["cpu", "gpu"] = "cpu"
    """Device to run on. On a GPU only PyTorch is measured beside this project."""
    precision: Literal["float32", "tf32", "bfloat16"] = PRECISION
    """Precision of products, on a CPU float32."""

    def __post_init__(self):
        launch.check_options(self)
        if self.platform == "cpu" and self.precision != PRECISION:
            raise UsageError(
                f"precision is {self.precision!r}; allowed on a CPU is {PRECISION}; "
                "change --precision or --platform"
            )


class Row(NamedTuple):
    """A line of the table: a contender's median time, and the ratio of our time to its."""

    framework: str
    mode: str
    median_s: float
    ratio: float
    lowest: float
    highest: float
    peak_rss_bytes: int | None


def rows(benchmarks: Sequence[Benchmark], *, ours: tuple[str, str] = OURS[:2]) -> list[Row]:
    """One row for each framework and mode among benchmarks of one name and model.

    Medians are over the rounds, of each round's median. A ratio compares two medians of the same
    round; the row has their median and range. A round that only one side has is left out.
    """
    medians: dict[tuple[str, str], dict[int, float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for b in benchmarks:
        who = b.framework, b.mode
        medians.setdefault(who, {})[b.details["round"]] = b.median_s
        peaks[who] = max(peaks.get(who, 0), b.details.get("peak_rss_bytes") or 0)
    table = []
    for who, theirs in medians.items():
        mine = medians[ours]
        ratios = [mine[i] / theirs[i] for i in sorted(mine.keys() & theirs.keys())] or [np.nan]
        spread = float(np.median(ratios)), min(ratios), max(ratios)
        table.append(Row(*who, float(np.median([*theirs.values()])), *spread, peaks[who] or None))
    return table


def measure(options: Options) -> None:
    """Runs all rounds, prints the tables and writes the file, after every process."""
    recorder = Recorder(options.output, {})
    left_out = recorder.context["left_out"]
    peers = PEERS if options.platform == "cpu" else ON_GPU
    contenders = [OURS, *(peer for peer in peers if peer.framework in options.frameworks)]
    for i in range(options.rounds):
        for model in options.models:
            shift = i % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                who = f"{contender.framework} ({contender.mode})"
                what = tuple(w for w in contender.what if w in options.what)
                if not what or who in left_out:
                    continue
                try:
                    done = ask(contender, model, what, options)
                except launch.ProcessError as error:
                    if contender == OURS:
                        raise
                    recorder.leave_out(who, f"{model}: {error}")
                    continue
                recorder.context |= done.output["context"]
                for w in what:
                    recorder.add(entry(contender, model, w, i, done, options))
                recorder.write()
        recorder.write()
    show(recorder.benchmarks)
    show_doubts(recorder.found)


def show_doubts(found: Results) -> None:
    """Names what could not be measured, and says when the machine was not idle."""
    for line in step.left_out(found):
        print(line)
    shares = [b.details["others_share"] or 0.0 for b in found.benchmarks]
    if max(shares) > BUSY:
        print(
            f"warning: other processes took {np.median(shares):.0%} of the processor (median; at "
            f"most {max(shares):.0%}), which slows some frameworks' threads far more than others; "
            "repeat this on an idle machine"
        )


def ask(
    contender: Contender, model: str, what: tuple[str, ...], options: Options
) -> launch.Finished:
    """One process; its output is the worker's answer."""
    where: dict[str, Any] = {"platform": options.platform, "precision": options.precision}
    size = options.batch_size
    job = Job(model=model, mode=contender.mode, what=what, batch_size=size, **where)
    if model == "cnn" and options.platform == "cpu":
        # A call of ours lasts a second in training; an evaluation, several.
        job = dataclasses.replace(job, min_sample_s=0.5, budget_s=4.0, warmup_s=5.0)
    ours = contender.worker in ("ours", "plain_flax")
    python = Path(sys.executable) if ours else options.peers_python
    module = f"benchmarks.peer_workers.{contender.worker}"
    variables = launch.ON_CPU if options.platform == "cpu" else {}
    return launch.ask(python, module, dataclasses.asdict(job), variables)


def entry(
    contender: Contender,
    model: str,
    what: str,
    number: int,
    done: launch.Finished,
    options: Options,
) -> Benchmark:
    """The benchmark made of a worker's answer."""
    times = timing.Timing(**done.output[what])
    details = {
        "round": number,
        "steps_per_sample": times.steps_per_sample,
        "others_share": done.others_share,
    }
    if what == "train":
        details["peak_rss_bytes"] = done.output["peak_rss_bytes"]
    return Benchmark.of(
        times.samples_s,
        times.warmup_s,
        name=NAMES[what],
        framework=contender.framework,
        mode=contender.mode,
        model=model,
        batch_size=options.batch_size,
        precision=options.precision,
        details=details,
    )


def milliseconds(seconds: float) -> str:
    """Three decimals of the short times, none of the long."""
    ms = 1e3 * seconds
    return f"{ms:.{3 if ms < 100 else 0}f}"


def show(benchmarks: Sequence[Benchmark], ours: tuple[str, str] = OURS[:2]) -> None:
    """Prints a table for each model and name."""
    console = Console()
    for model, name in dict.fromkeys((b.model, b.name) for b in benchmarks):
        chosen = [b for b in benchmarks if (b.model, b.name) == (model, name)]
        count = len({b.details["round"] for b in chosen})
        table = Table(title=f"{model}, {name}, {count} rounds: {ours[0]} ({ours[1]}) ÷ each")
        table.add_column("framework", no_wrap=True)
        table.add_column("mode", no_wrap=True)
        found = rows(chosen, ours=ours)
        memory = ["peak MB"] * any(row.peak_rss_bytes for row in found)
        for heading in ("ms", "ratio (range)", *memory):
            table.add_column(heading, justify="right")
        for row in found:
            ratio = f"{row.ratio:.3f} ({row.lowest:.3f}…{row.highest:.3f})"
            cells = [row.framework, row.mode, milliseconds(row.median_s), ratio]
            table.add_row(*cells, *[f"{(row.peak_rss_bytes or 0) / 1e6:.0f}" for _ in memory])
        console.print(table)


def side_by_side(benchmarks: Sequence[Benchmark], name: str) -> Table:
    """Of one name, all models in a table: milliseconds, and how ours compare (ratio; range)."""
    models = dict.fromkeys(b.model for b in benchmarks)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for model in models:
        for row in rows([b for b in benchmarks if (b.model, b.name) == (model, name)]):
            who = row.framework, row.mode
            spread = f" ({row.ratio:.2f}; {row.lowest:.2f}…{row.highest:.2f})"
            text = milliseconds(row.median_s) + spread * (who != OURS[:2])
            cells.setdefault(who, {})[model] = text
    table = Table(title=f"{name}, ms (our time ÷ theirs; range)")
    for heading in ("framework", "mode", *models):
        table.add_column(heading, no_wrap=True)
    for who, of_model in sorted(cells.items(), key=lambda item: item[0] != OURS[:2]):
        table.add_row(*who, *(of_model.get(model, "-") for model in models))
    return table


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.peers", __doc__ or ""))
