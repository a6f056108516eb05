"""Where the memory of a training step goes, by batch size.

    python -m benchmarks.memory --model cnn --batch_size 100 1000 --output FILE

Parameters and the optimizer's state are counted. Activations are the outputs of all layers, which
the backward pass needs at most. The program's arguments, results and temporaries are what the
compiler lays out; its temporaries hold activations, gradients and transforms. The peak is observed:
of a process that only trained, imports and 60,000 images included, or of the device where it keeps
count.
"""

import dataclasses
import math
import sys
from functools import partial

import jax
from rich import box
from rich.table import Table

from benchmarks import launch, step
from benchmarks.peer_workers import job as jobs
from benchmarks.results import Recorder, Results
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.models import MODELS, layers
from mnist_jax.optimizer import make_optimizer
from mnist_jax.runs.checkpoint import tree_bytes

COLUMNS = ("params", "optimizer", "activations", "temporaries", "program", "peak")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""

    batch_size: tuple[int, ...] = (100, 1000)
    """Images a training step; one or several."""
    repeats: int = 20
    """Of no effect here: nothing is timed."""


def counted(job: jobs.Job) -> dict[str, int]:
    """What needs no measuring: bytes of parameters, optimizer and activations."""
    model = MODELS[job.model]()
    init = partial(steps.init_state, model=model, tx=make_optimizer(Config(), 1))
    state = jax.eval_shape(init, jax.random.key(0))
    numbers = sum(math.prod(layer.output_shape) for layer in layers(model))
    each = 2 if job.precision == "bfloat16" else 4
    return {
        "params_bytes": tree_bytes(state.params),
        "optimizer_bytes": tree_bytes(state.opt_state),
        "activations_bytes": job.batch_size * numbers * each,
    }


def measure(options: Options) -> None:
    """Measures every case in a process of its own, prints the table and writes the file."""
    context = launch.where(options.platform)
    recorder = Recorder(options.output, context)
    for job in step.jobs_of(options, ("many",), ("train",)):
        with step.left_out_if_impossible(recorder, step.describe(job)):
            [found] = step.in_own_process(dataclasses.replace(job, samples=3), context["platform"])
            observed = {f"{name}_bytes": found.details[f"{name}_bytes"] for name in COLUMNS[3:]}
            names = {key: step.named(job, "")[key] for key in ("model", "batch_size", "precision")}
            recorder.row("memory", **names, **counted(job), **observed)
        recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table | str]:
    """The table."""
    table = Table(title="memory of a training step, MB", box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for heading in ("batch", *COLUMNS):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.tables.get("memory", []):
        sizes = [f"{row[f'{name}_bytes'] / 1e6:.4g}" for name in COLUMNS]
        table.add_row(row["model"], str(row["batch_size"]), *sizes)
    return [table, *step.left_out(found)]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.memory", __doc__ or ""))
