"""How near a training step, and each of its layers, comes to what the device can do.

    python -m benchmarks.roofline --output FILE

The roof is measured, not looked up: how fast this device multiplies two large matrices in each
precision, and how fast it adds 1 to 256 MB, which reads and writes each byte once. A step takes at
least its operations at the one rate, and at least its bytes at the other; the larger is its limit.

Operations, two for a multiplication with its addition: each layer's product forward, for the
kernel's gradient and, but for the first layer, for its input's. A convolution counts as Winograd
multiplies it where that is known to run, on a CPU, and beside that by its definition, from which
MFU, the model FLOPs utilization, is reckoned: where Winograd saves products it can exceed 1. Bytes
of a step: every output of a layer, and its gradient, written and read once; parameters read, their
gradients written; and for the update those gradients read, parameters and Adam's two moments read
and written. What else a step does (transforms, sums, a second reading) the limit leaves out.

A layer is timed by itself, forward and backward, in a loop on the device, on random numbers; its
bytes are those of the two passes (`Alone.bytes`). What makes each turn's numbers differ from the
last one's, a multiplication of all of them, is part of its time.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from rich import box
from rich.table import Table

from benchmarks import launch, step, timing
from benchmarks.peer_workers import job as jobs
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.config import Config
from mnist_jax.models import IMAGE_SHAPE, MODELS, layers, param_shapes
from mnist_jax.ops import convolution
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs.checkpoint import tree_bytes
from mnist_jax.steps import loss_fn

MATRIX_SIZE, COPY_BYTES, FLOAT_BYTES = 2048, 2**28, 4
LARGER = 4  # times as many rows on an accelerator, which so small a product may not fill
GROUP = 16  # turns of a loop
PRODUCT, COPY, LAYER, UPDATE = "matrix_product", "copy", "layer", "update"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""


class Work(NamedTuple):
    """What a training step, or a part of it, must at least do.

    Attributes:
        flops: floating-point operations of the products that run.
        direct_flops: the same by the definition of each layer.
        bytes: to and from memory.
    """

    flops: int
    direct_flops: int
    bytes: int

    def limit_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The least time that it takes at these rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)


def works(model: nn.Module, batch_size: int, platform: str) -> dict[str, Work]:
    """The work of each layer, dense or a 3×3 convolution, and of the update, by their names.

    Here an output and its gradient are counted once written and once read, as in a whole step.
    """
    params = param_shapes(model)
    dtype = getattr(model, "dtype", None)
    activation_bytes = FLOAT_BYTES if dtype is None else jnp.dtype(dtype).itemsize
    found: dict[str, Work] = {}
    parameters = 0
    for layer in layers(model):
        if layer.kind in ("Flatten", "Dropout"):  # a view; a part of its neighbour
            continue
        parameters += layer.parameters
        moved = 4 * batch_size * math.prod(layer.output_shape) * activation_bytes
        moved += 2 * layer.parameters * FLOAT_BYTES
        if not layer.parameters:
            found[layer.name] = Work(0, 0, moved)
            continue
        *window, inputs, outputs = params[layer.name]["kernel"].shape
        places = math.prod(layer.output_shape[:-1])  # 1 for a dense layer
        direct = products = places * math.prod(window)
        if window == [3, 3] and inputs > 1 and platform == "cpu":
            tiles = [math.ceil(n / convolution.TILE) for n in layer.output_shape[:2]]
            products = math.prod(tiles) * convolution.SPAN**2
        passes = 3 if any(work.flops for work in found.values()) else 2
        each = 2 * passes * batch_size * inputs * outputs
        found[layer.name] = Work(each * products, each * direct, moved)
    found[UPDATE] = Work(0, 0, 7 * parameters * FLOAT_BYTES)
    return found


def train_work(model: nn.Module, batch_size: int, platform: str) -> Work:
    """The work of one step: of all layers and the update."""
    return Work(
        *(sum(part) for part in zip(*works(model, batch_size, platform).values(), strict=True))
    )


def counted_by_xla(model: nn.Module, batch_size: int) -> float:
    """The operations of a step's loss and gradient, as XLA's cost analysis counts them.

    More than the products: activations, loss, pooling, a Winograd convolution's transforms. Less
    where it convolves itself, for it leaves out products with the padding's zeros.
    """
    batch: Any = {
        "image": jax.ShapeDtypeStruct((batch_size, *IMAGE_SHAPE), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch_size,), bool),
    }
    gradient = jax.jit(jax.grad(partial(loss_fn, model=model), has_aux=True))
    analysis: Any = gradient.lower(param_shapes(model), batch).cost_analysis()
    return float((analysis or {}).get("flops", math.nan))


def time_loop(body: Any, state: Any, args: Any, samples: int) -> timing.Timing:
    """Seconds for a turn of `body`, (i, state, args) → state, of which a call runs many.

    Turns are grouped by 16 in loops of known length: an accelerator asks the host before each turn
    of a loop whose length it does not know.

    Args:
        body: one turn.
        state: what the first starts from; donated.
        args: what all of them read; never part of the program, where it could be reckoned before.
        samples: how many are wanted.
    """

    @partial(jax.jit, donate_argnums=0)
    def run(state: Any, args: Any, groups: Any) -> Any:
        def group(i: jax.Array, state: Any) -> Any:
            turn = partial(_turn, i * GROUP)
            return lax.fori_loop(0, GROUP, turn, state)

        def _turn(first: jax.Array, i: jax.Array, state: Any) -> Any:
            return body(first + i, state, args)

        return lax.fori_loop(0, groups, group, state)

    def call(state: Any, steps: int) -> Any:
        return run(state, args, steps)

    limits = {"samples": samples, "budget_s": 1.5, "warmup_s": 3.0}
    groups = timing.measure(call, state, sync=jax.block_until_ready, **limits)[0]
    return timing.Timing(
        [s / GROUP for s in groups.warmup_s],
        [s / GROUP for s in groups.samples_s],
        GROUP * groups.steps_per_sample,
    )


def random_like(tree: Any) -> Any:
    """Normally distributed arrays of these shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, made)


def matrix_size(device: jax.Device) -> int:
    """Rows and columns of the two matrices that are multiplied there."""
    return MATRIX_SIZE * (1 if device.platform == "cpu" else LARGER)


def matrix_rate(samples: int, size: int, dtype: Any = None) -> timing.Timing:
    """Seconds for a product of two matrices of so many rows and columns."""
    x, other = jax.random.normal(jax.random.key(0), (2, size, size))
    rotation, _ = jnp.linalg.qr(other)  # so that products neither grow nor shrink
    args = rotation.astype(dtype or jnp.float32)
    return time_loop(lambda _, x, other: x @ other, x.astype(args.dtype), args, samples)


def copy_rate(samples: int) -> timing.Timing:
    """Seconds to read and write `COPY_BYTES`."""
    start = jax.random.normal(jax.random.key(0), (COPY_BYTES // FLOAT_BYTES,))
    return time_loop(lambda i, x, _: x + i.astype(jnp.float32), start, (), samples)


class Alone(NamedTuple):
    """A layer by itself, with the shapes and dtypes of its parameters, input and output."""

    module: nn.Module
    params: Any
    x: Any
    y: Any

    def time(self, *, first: bool, samples: int) -> timing.Timing:
        """Seconds forward and backward; the first layer's input has no gradient."""

        def both_passes(params: Any, x: jax.Array, g: jax.Array) -> Any:
            def apply(params: Any, x: jax.Array) -> Any:
                return self.module.apply({"params": params}, x)

            if first:
                y, backward = jax.vjp(lambda params: apply(params, x), params)
            else:
                y, backward = jax.vjp(apply, params, x)
            return y, backward(g)

        args = random_like((self.params, self.x, self.y))

        def body(i: jax.Array, _: Any, args: Any) -> Any:
            # Other numbers in every turn, or the compiler would take the work out of the loop.
            some = 1 + 1e-6 * i.astype(jnp.float32)
            args = jax.tree.map(lambda leaf: some.astype(leaf.dtype) * leaf, args)
            return both_passes(*args)

        shapes = jax.eval_shape(both_passes, *args)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return time_loop(body, start, args, samples)

    def bytes(self, *, first: bool) -> int:
        """What the two passes at least read and write: each input and result once a pass.

        Forward: parameters and input read, output written. Backward: parameters, input and the
        output's gradient read, the gradients of the parameters and, but for the first layer, of
        the input written.
        """
        params, x, y = (tree_bytes(part) for part in (self.params, self.x, self.y))
        return 3 * params + 2 * x + 2 * y + (0 if first else x)


def alone(model: nn.Module, batch_size: int) -> dict[str, Alone]:
    """The layers that do something of their own, by their names, in the order they run."""
    found: dict[str, Alone] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, y = context.module, call(*args, **kwargs)
        if module.scope is None or len(module.path) != 1:
            return y
        if type(module).__name__ not in ("Flatten", "Dropout"):
            params = module.variables.get("params", {})
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
            x, y_ = (
                jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype) for a in (args[0], y)
            )
            found[module.name] = Alone(module.clone(parent=None, name=None), shapes, x, y_)
        return y

    with nn.intercept_methods(record):
        param_shapes(model)
    return found


def time_update(model: nn.Module, samples: int) -> timing.Timing:
    """Seconds for Adam's update of all parameters."""
    tx = make_optimizer(Config(), 1)
    params, grads = random_like((param_shapes(model), param_shapes(model)))

    def body(_: Any, state: Any, grads: Any) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return time_loop(body, jax.block_until_ready((params, tx.init(params))), grads, samples)


def measure(options: Options) -> None:
    """Measures the roof, the steps and their parts, prints the tables and writes the file."""
    context = launch.where(options.platform)
    recorder = Recorder(options.output, context)
    # Before this process takes the device, and before the roof's large arrays, which slow a step.
    wholes: dict[jobs.Job, Benchmark] = {}
    for job in step.jobs_of(options, ("many",), ("train",)):
        with step.left_out_if_impossible(recorder, step.describe(job)):
            [wholes[job]] = step.in_own_process(job, context["platform"])
    device = devices.select_device(options.platform)

    def add(name: str, times: timing.Timing, job: jobs.Job | None = None, **details: Any) -> float:
        names = step.named(job or jobs.Job(model="", mode=""), name)
        names |= {"precision": precision}
        made = Benchmark.of(times.samples_s, times.warmup_s, details=details, **names)
        recorder.add(made)
        recorder.write()
        return made.median_s

    for precision in options.precision:
        with (
            step.left_out_if_impossible(recorder, precision),
            jax.default_device(device),
        ):
            dtype = devices.compute_dtype(precision, device)
            with jax.default_matmul_precision(devices.MATMUL_PRECISION[precision]):
                size = matrix_size(device)
                flops, moved = 2 * size**3, 2 * COPY_BYTES
                rates = (
                    flops / add(PRODUCT, matrix_rate(options.repeats, size, dtype), flops=flops),
                    moved / add(COPY, copy_rate(options.repeats), bytes=moved),
                )
            for job, whole in wholes.items():
                if job.precision == precision:
                    with step.left_out_if_impossible(recorder, step.describe(job)):
                        _measure_step(job, whole, device, rates, add)
        recorder.write()
    launch.show(report(recorder.found))


def _measure_step(
    job: jobs.Job, whole: Benchmark, device: jax.Device, rates: tuple[float, float], add: Any
) -> None:
    """A whole step, as measured before, and its parts."""
    model = MODELS[job.model](dtype=devices.compute_dtype(job.precision, device))
    work = train_work(model, job.batch_size, device.platform)
    limit_s = work.limit_s(*rates)
    times = timing.Timing(whole.warmup_s, whole.samples_s, 0)
    mfu = work.direct_flops / whole.median_s / rates[0]
    xla = {"xla_flops": counted_by_xla(model, job.batch_size)}
    add(step.TRAIN, times, job, **work._asdict(), **xla, limit_s=limit_s, mfu=mfu)
    parts = works(model, job.batch_size, device.platform)
    with jax.default_matmul_precision(devices.MATMUL_PRECISION[job.precision]):
        layers_ = alone(model, job.batch_size)
        for name, layer in layers_.items():
            first = name == next(iter(layers_))
            times = layer.time(first=first, samples=job.samples)
            part = parts[name]._replace(bytes=layer.bytes(first=first))
            details = {"layer": name, **part._asdict()}
            add(LAYER, times, job, **details, limit_s=part.limit_s(*rates))
        details = {"layer": UPDATE, **parts[UPDATE]._asdict()}
        times = time_update(model, job.samples)
        add(LAYER, times, job, **details, limit_s=parts[UPDATE].limit_s(*rates))


def roof(benchmarks: Sequence[Benchmark], precision: str) -> tuple[float, float]:
    """The measured rates: operations and bytes a second."""
    chosen = {b.name: b for b in benchmarks if b.precision == precision and not b.model}
    product, copy = chosen[PRODUCT], chosen[COPY]
    return (
        product.details["flops"] / product.median_s,
        copy.details["bytes"] / copy.median_s,
    )


def report(found: Results) -> list[Table | str]:
    """A table for each network, and before it the roof."""
    benchmarks, parts = found.benchmarks, list[Table | str]()
    for precision in dict.fromkeys(b.precision for b in benchmarks if b.name == COPY):
        flops_per_s, bytes_per_s = roof(benchmarks, precision)
        rates = f"{flops_per_s / 1e9:.4g} GFLOP/s and {bytes_per_s / 1e9:.4g} GB/s"
        parts.append(f"{precision}: a roof of {rates}")
        chosen = [b for b in benchmarks if b.precision == precision and b.model]
        for model, batch_size in dict.fromkeys((b.model, b.batch_size) for b in chosen):
            table = Table(title=f"{model}, batch {batch_size}, {precision}", box=box.SIMPLE)
            table.add_column("part", no_wrap=True)
            heads = ("GFLOP", "direct", "MB", "FLOP/byte", "limit ms", "ms", "limit ÷ time")
            for heading in heads:
                table.add_column(heading, justify="right", no_wrap=True)
            mfu = ""
            for b in chosen:
                if (b.model, b.batch_size) != (model, batch_size):
                    continue
                work = b.details
                if "mfu" in work:
                    mfu = f"MFU, operations by definition: {work['mfu']:.1%}; XLA counts "
                    mfu += f"{work['xla_flops'] / 1e9:.4g} GFLOP without the update"
                numbers = (work["flops"] / 1e9, work["direct_flops"] / 1e9, work["bytes"] / 1e6)
                intensity = work["flops"] / work["bytes"]
                times = 1e3 * work["limit_s"], 1e3 * b.median_s
                cells = [f"{number:.4g}" for number in (*numbers, intensity, *times)]
                name = work.get("layer", "a step")
                table.add_row(name, *cells, f"{work['limit_s'] / b.median_s:.2f}")
            parts += [table, mfu]
    return [*parts, *step.left_out(found)]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.roofline", __doc__ or ""))
