"""Whether the compiled step lowers for platforms that are not at hand, and to what.

    python -m benchmarks.lowering --output FILE

An epoch of `steps.train_steps`, exported by `jax.export` for each platform on any machine: what
fails here would fail there. Operations are those of the StableHLO module, before the platform's own
compiler; a CPU's convolutions are this project's, elsewhere they are the platform's.
"""

import collections
import dataclasses
import re
import sys
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from rich import box
from rich.table import Table

from benchmarks import launch, step
from benchmarks.results import Recorder, Results
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.metrics import Metrics
from mnist_jax.models import IMAGE_SHAPE, MODELS
from mnist_jax.optimizer import make_optimizer, step_config
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TRAIN_SIZE = 60_000
SHOWN = ("dot_general", "convolution", "while", "case", "sort", "gather", "reduce", "reduce_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Of no effect here: every platform is lowered for."""
    repeats: int = 20
    """Of no effect here: nothing is timed."""


def operations(model: str, batch_size: int, precision: str, platform: str) -> dict[str, int]:
    """How often each operation stands in the module of an epoch."""
    config = Config(model=model, batch_size=batch_size, precision=precision)
    network = MODELS[model](dtype=jnp.bfloat16 if precision == "bfloat16" else None)
    tx = make_optimizer(config, 1)
    key = jax.random.key(0)
    state = jax.eval_shape(partial(steps.init_state, model=network, tx=tx), key)
    shape = jax.ShapeDtypeStruct
    split = Split(
        shape((TRAIN_SIZE, *IMAGE_SHAPE), np.uint8),  # pyright: ignore[reportArgumentType]
        shape((TRAIN_SIZE,), np.int32),  # pyright: ignore[reportArgumentType]
    )
    order, first = shape((TRAIN_SIZE,), np.int32), np.int32(0)
    recipe = step_config(config)
    train_steps = partial(
        steps.train_steps, model=network, tx=tx, batch_size=batch_size, recipe=recipe
    )
    epoch = steps.num_batches(TRAIN_SIZE, batch_size)
    args: list[Any] = [state, Metrics.zeros(), split, order, key, first]
    # As in `programs`: the length is an argument on a CPU, and elsewhere a part of the program.
    if platform == "cpu":
        make_steps, args = jax.jit(train_steps), [*args, np.int32(epoch)]
    else:
        make_steps, args = jax.jit(train_steps, static_argnums=6), [*args, epoch]
    with jax.default_matmul_precision(devices.MATMUL_PRECISION[precision]):
        module = export.export(make_steps, platforms=[platform])(*args).mlir_module()
    return dict(collections.Counter(re.findall(r"= \"?stablehlo\.(\w+)", module)))


def measure(options: Options) -> None:
    """Exports every case for every platform, prints the table and writes the file."""
    recorder = Recorder(options.output, environment.describe(jax.devices()[0]))
    for model in options.model:
        for batch_size in options.batch_size:
            for precision in options.precision:
                for platform in PLATFORMS:
                    case = {"model": model, "batch_size": batch_size, "precision": precision}
                    try:
                        found = operations(model, batch_size, precision, platform)
                    except Exception as error:  # whatever it is, there is no program there
                        what = f"{model}, batch {batch_size}, {precision}, {platform}"
                        recorder.leave_out(what, f"{type(error).__name__}: {error}")
                        continue
                    launch.say(f"{model}, {platform}: {sum(found.values())} operations")
                    recorder.row("lowering", **case, platform=platform, operations=found)
        recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table | str]:
    """The table."""
    table = Table(title="operations of a compiled epoch, before the compiler", box=box.SIMPLE)
    for heading in ("model", "platform", "all", *SHOWN):
        table.add_column(heading, no_wrap=True)
    for row in found.tables.get("lowering", []):
        counts = row["operations"]
        counts = [sum(counts.values()), *(counts.get(name, 0) for name in SHOWN)]
        table.add_row(row["model"], row["platform"], *map(str, counts))
    return [table, *step.left_out(found)]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.lowering", __doc__ or ""))
