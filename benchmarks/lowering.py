"""Says for which platforms the compiled epoch lowers, from any machine.

    python -m benchmarks.lowering --output FILE

`jax.export` lowers an epoch of training steps for each platform; what fails here fails there. A
CPU's convolutions are this project's products, elsewhere they are the platform's convolutions.
"""

import argparse
import collections
import re
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from benchmarks import launch, results
from benchmarks.results import Recorder, Results
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.metrics import Metrics
from mnist_jax.models import IMAGE_SHAPE, MODELS
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel import mesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SIZE = 60_000
SHOWN = ("dot_general", "convolution", "while", "sort", "gather", "reduce")


def operations(model: str, batch_size: int, precision: str, platform: str) -> dict[str, int]:
    """How often each StableHLO operation stands in the module of an epoch."""
    config = Config(model=model, batch_size=batch_size, precision=precision).resolve()
    dtype = jnp.bfloat16 if precision == "bfloat16" else None
    network = MODELS[model](dtype=dtype, **config.model_options())
    tx, key, shape = make_optimizer(config, 1), jax.random.key(0), jax.ShapeDtypeStruct
    state = jax.eval_shape(partial(steps.init_state, model=network, tx=tx), key)
    split: Any = Split(shape((SIZE, *IMAGE_SHAPE), np.uint8), shape((SIZE,), np.int32))  # pyright: ignore
    common = {"batch_size": batch_size, "step_config": steps.make_step_config(config)}
    train_steps = partial(steps.train_steps, model=network, tx=tx, **common)
    args = state, Metrics.zeros(), split, shape((SIZE,), np.int32), key, np.int32(0)
    # As in the trainer: the number of steps is an argument on a CPU, elsewhere it is static.
    program = jax.jit(train_steps, static_argnums=() if platform == "cpu" else 6)
    count = steps.num_batches(SIZE, batch_size)
    length = np.int32(count) if platform == "cpu" else count
    with jax.default_matmul_precision(mesh.MATMUL_PRECISION[precision]):
        module = export.export(program, platforms=[platform])(*args, length).mlir_module()
    return dict(collections.Counter(re.findall(r"= \"?stablehlo\.(\w+)", module)))


def measure(options: argparse.Namespace) -> None:
    """Lowers every network for every platform, prints the table and writes the file."""
    recorder = Recorder(options.output, launch.describe(mesh.select_device(options.platform)))
    for model in options.model:
        for platform in PLATFORMS:
            case = {"model": model, "batch_size": options.batch_size[0]}
            case |= {"precision": options.precision[0], "platform": platform}
            try:
                recorder.row("lowering", **case, operations=operations(**case))
            except Exception as error:  # any: there is no program for this platform
                recorder.exclude(f"{model}, {platform}", f"{type(error).__name__}: {error}")
    recorder.finish(report)


def report(found: Results) -> list[str]:
    """The table."""
    rows = []
    for row in found.tables.get("lowering", []):
        counts = [sum(row["operations"].values()), *(row["operations"].get(x, 0) for x in SHOWN)]
        rows.append([row["model"], row["platform"], *map(str, counts)])
    title = "StableHLO operations of a compiled epoch"
    return [results.table(title, ["model", "platform", "all", *SHOWN], rows)]


if __name__ == "__main__":
    sys.exit(launch.main(__doc__, measure, launch.CASES))
