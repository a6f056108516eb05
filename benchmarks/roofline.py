"""How near a training step comes to what the device can do.

    python -m benchmarks.roofline --output FILE

The roof is measured, not looked up: how fast this device multiplies two large matrices, and how
fast it adds 1 to 256 MB, which reads and writes each byte once. A step takes at least its
operations at the one rate, and at least its bytes at the other; the larger is its limit.

Operations, two for a multiplication with its addition: each layer's product forward, for the
kernel's gradient and, but for the first layer, for its input's. A convolution counts as Winograd
multiplies it where that is what runs. Bytes: every output of a layer, and its gradient, written
and read once; parameters and Adam's two moments read and written, gradients written and read. What
else a step does (transforms, sums, a second reading) is what the limit leaves out.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import launch, peers, results, timing
from benchmarks.results import Benchmark
from mnist_jax import convolution, devices, environment
from mnist_jax.models import MODELS, layers, params_of

MATRIX_SIZE, COPY_BYTES, FLOAT_BYTES = 2048, 2**28, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags."""

    output: Path
    """The result file."""
    models: tuple[peers.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to measure."""
    batch_size: int = 100
    """Images a training step."""
    repeats: int = 20
    """Samples of the roof's rates."""

    def __post_init__(self):
        launch.check_options(self)


class Work(NamedTuple):
    """What a training step must at least do.

    Attributes:
        flops: floating-point operations of the products that run.
        direct_flops: the same by the definition of each layer.
        bytes: to and from memory.
    """

    flops: int
    direct_flops: int
    bytes: int


def train_work(model: nn.Module, batch_size: int, platform: str) -> Work:
    """The work of one step, summed over the layers; all of them dense or 3×3 convolutions."""
    params = params_of(model)
    flops = direct_flops = numbers = 0
    first = True
    for layer in layers(model):
        if layer.kind in ("Flatten", "Dropout"):  # a view; a part of its neighbour
            continue
        numbers += 4 * batch_size * math.prod(layer.output_shape) + 8 * layer.parameters
        if not layer.parameters:
            continue
        *window, inputs, outputs = params[layer.name]["kernel"].shape
        places = math.prod(layer.output_shape[:-1])  # 1 for a dense layer
        direct = products = places * math.prod(window)
        if window == [3, 3] and inputs > 1 and platform == "cpu":
            tiles = [math.ceil(n / convolution.TILE) for n in layer.output_shape[:2]]
            products = math.prod(tiles) * convolution.SPAN**2
        passes = 2 if first else 3
        first = False
        each = 2 * passes * batch_size * inputs * outputs
        flops += each * products
        direct_flops += each * direct
    return Work(flops, direct_flops, numbers * FLOAT_BYTES)


def matrix_rate(samples: int) -> timing.Timing:
    """Seconds for a product of two float32 matrices of `MATRIX_SIZE` rows and columns."""
    start, other = jax.random.normal(jax.random.key(0), (2, MATRIX_SIZE, MATRIX_SIZE))
    other = other / MATRIX_SIZE**0.5  # so that repeated products stay finite

    @jax.jit
    def multiply(x: jax.Array, other: jax.Array, steps: int) -> jax.Array:
        return lax.fori_loop(0, steps, lambda _, x: x @ other, x)

    def call(x: jax.Array, steps: int) -> jax.Array:
        return multiply(x, other, steps)

    return timing.measure(call, start, sync=jax.block_until_ready, samples=samples)[0]


def copy_rate(samples: int) -> timing.Timing:
    """Seconds to read and write `COPY_BYTES`."""

    def add(x: jax.Array, steps: int) -> jax.Array:
        return lax.fori_loop(0, steps, lambda _, x: x + 1, x)

    start = jnp.zeros(COPY_BYTES // FLOAT_BYTES)
    call: Any = jax.jit(add, donate_argnums=0)
    return timing.measure(call, start, sync=jax.block_until_ready, samples=samples)[0]


def measure(options: Options) -> None:
    """Measures the roof and the steps, prints the table and writes the file."""
    results.check_writable(options.output)
    device = jax.devices()[0]
    context = {"command": sys.argv[1:], **environment.describe(device)}
    benchmarks: list[Benchmark] = []

    def add(name: str, model: str, times: timing.Timing, **details: Any) -> float:
        names = {"name": name, "framework": "mnist_jax", "model": model, "mode": peers.OURS.mode}
        common = {"batch_size": options.batch_size, "precision": peers.PRECISION}
        made = Benchmark.of(times.samples_s, times.warmup_s, details=details, **names, **common)
        benchmarks.append(made)
        launch.say(f"{model or 'roof'}: {peers.describe(made)}")
        return made.median_s

    with jax.default_matmul_precision(devices.MATMUL_PRECISION[peers.PRECISION]):
        flops = 2 * MATRIX_SIZE**3
        flops_per_s = flops / add("matrix_product", "", matrix_rate(options.repeats), flops=flops)
        moved = 2 * COPY_BYTES
        bytes_per_s = moved / add("copy", "", copy_rate(options.repeats), bytes=moved)
        for name in options.models:
            # In a process of its own: what the roof's large arrays leave behind slows a step here.
            answer = peers.ask(peers.OURS, name, ("train",), options.batch_size)
            times = timing.Timing(**answer.output["train"])
            work = train_work(MODELS[name](), options.batch_size, device.platform)
            limit_s = max(work.flops / flops_per_s, work.bytes / bytes_per_s)
            add("train_step", name, times, **work._asdict(), limit_s=limit_s)
    results.write(options.output, context, benchmarks)
    show(benchmarks, flops_per_s, bytes_per_s)


def show(benchmarks: list[Benchmark], flops_per_s: float, bytes_per_s: float) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"training steps under a roof of {flops_per_s / 1e9:.0f} GFLOP/s "
        f"and {bytes_per_s / 1e9:.1f} GB/s"
    )
    table = Table(title=title)
    table.add_column("model")
    for heading in ("GFLOP", "by definition", "MB", "limit ms", "ms", "limit ÷ time"):
        table.add_column(heading, justify="right")
    for b in benchmarks:
        if b.name != "train_step":
            continue
        work, limit_s = b.details, b.details["limit_s"]
        sizes = (work["flops"] / 1e9, work["direct_flops"] / 1e9, work["bytes"] / 1e6)
        cells = [f"{size:.4g}" for size in sizes]
        ms = [peers.milliseconds(seconds) for seconds in (limit_s, b.median_s)]
        table.add_row(b.model, *cells, *ms, f"{limit_s / b.median_s:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.roofline", __doc__ or ""))
