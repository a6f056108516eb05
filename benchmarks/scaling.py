"""How a training step scales over the devices of this machine, and what to expect of more.

    python -m benchmarks.scaling --model cnn --output FILE
    python -m benchmarks.scaling --predict

Strong scaling spreads one batch over 1, 2, 4 … devices; weak scaling gives each device as many
images. Beside them one device is timed with the share that it has of a strong batch, and the sum
over the devices by itself, of arrays like the gradients. All take turns, a sample each in every
round: what disturbs the machine disturbs all alike.

--predict measures nothing: it reckons by benchmarks/cost_model.py, with step times and links that
are assumed. Where accelerators were measured, the same is shown from their step times.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec
from rich import box
from rich.table import Table

from benchmarks import cost_model, forecast, launch, roofline, step, timing
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.mesh import Layout
from mnist_jax.runs import environment
from mnist_jax.runs.checkpoint import tree_bytes
from mnist_jax.trainer import dynamic_loop_bound

STRONG, WEAK, SHARE, SUM = "strong", "weak", "share alone", "all_reduce"
VIRTUAL = (
    "All devices are one CPU's and compute on the same cores: here no efficiency can be measured, "
    "only whether the devices agree, and what spreading the same work over them costs."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(forecast.Options):
    """The flags."""

    devices: tuple[int, ...] | None = None
    """How many devices to spread over; one or several. None: 2, 4, 8 and so on up to all."""
    predict: bool = False
    """Measure nothing; predict from step times and links that are assumed."""

    def __post_init__(self):
        super().__post_init__()
        if self.predict and self.devices:
            raise UsageError(
                f"--predict is of {' and '.join(map(str, forecast.PREDICTED))} devices and needs "
                "none; leave --devices or --predict out"
            )


def device_counts(found: int, asked: Sequence[int], platform: str) -> list[int]:
    """The numbers of devices to measure, from 1 on.

    Raises:
        DeviceError: there are too few.
        UsageError: none but 1 is asked for.
    """
    most = max(asked, default=2)
    if most == 1:
        raise UsageError("devices is 1, which is measured in any case; name a larger number")
    if found < most:
        raise DeviceError(
            f"{most} devices are needed; JAX finds {found} of {platform}; to try it on a CPU, set "
            f"JAX_NUM_CPU_DEVICES={max(8, most)} in the environment, with --platform=cpu"
        )
    powers = [2**i for i in range(found.bit_length())]
    return sorted({1, *(asked or [*powers, found])})


class Case(NamedTuple):
    """Something timed in turn with others.

    Attributes:
        names: the fields by which its benchmark is found.
        call: (state, steps) → state.
        state: what it starts from.
        details: what else to note.
    """

    names: dict[str, Any]
    call: Callable[[Any, int], Any]
    state: Any
    details: dict[str, Any]


def sum_alone(tree: Any, layout: Layout) -> tuple[Any, Any]:
    """The sum over the devices of arrays such as gradients: a program, and what it starts from.

    Every device begins with arrays of its own, stacked along their first axis. The program, of
    (arrays, how often), divides each sum by the number of devices, so that numbers keep their size:
    every sum needs the one before, and none can be left out.

    Args:
        tree: their shapes and dtypes.
        layout: two devices or more.
    """
    mesh = layout.mesh
    assert mesh is not None and layout.spread is not None
    axes, any_length = mesh.axis_names, dynamic_loop_bound(layout.devices[0])
    lying = PartitionSpec(*axes)

    def means(arrays: Any, count: Any) -> Any:
        def turn(_: Any, here: Any) -> Any:
            return jax.tree.map(lambda x: lax.pmean(x, axes), here)

        def loop(here: Any) -> Any:
            return lax.fori_loop(0, count, turn, here)

        spread = jax.shard_map(loop, mesh=mesh, in_specs=lying, out_specs=lying, check_vma=False)
        return spread(arrays)

    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(layout.devices), *x.shape), x.dtype), tree
    )
    start = jax.device_put(roofline.random_like(stacked), layout.spread)
    return jax.jit(means, donate_argnums=0, static_argnums=() if any_length else 1), start


def cases_of(job: jobs.Job, found: Sequence[jax.Device], counts: Sequence[int]) -> Iterator[Case]:
    """What is measured of a job, whose `batch_size` is the images of a step on one device.

    The gradients compared are those of the first batch, of which Adam's first moment is a tenth.
    """
    data, reference, params = jobs.make_data(job), None, param_shapes(MODELS[job.model]())
    for count in counts:
        alone, every = (Layout(tuple(found[:n])) for n in (1, count))
        kinds = [(STRONG, job.batch_size, every)]
        if count > 1:
            share = -(-job.batch_size // count)
            kinds += [(WEAK, count * job.batch_size, every), (SHARE, share, alone)]
        for kind, images, layout in kinds:
            one = dataclasses.replace(job, batch_size=images, mode=f"{kind}, {count}")
            fed = ours.make(one, data, layout=layout)
            state = fed.state
            details = {"kind": kind, "devices": count, "base": job.batch_size}
            if kind == STRONG:
                state = fed.train(state, 1)
                gradients = jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu"))
                reference = reference or gradients
                details["gradients_apart"] = apart(gradients, reference)
            yield Case(step.named(one, step.TRAIN), fed.train, state, details)
        if count > 1:
            program, start = sum_alone(params, every)
            run = ours.AnyLength(program, found[0], count)
            names = step.named(dataclasses.replace(job, mode=f"{count} devices"), SUM)
            details = {"kind": SUM, "devices": count, "base": job.batch_size}
            details["bytes"] = tree_bytes(params)
            yield Case(names, lambda x, n, run=run: run(x, count=n), start, details)


def apart(tree: Any, reference: Any) -> float:
    """The largest difference of a leaf, relative to the largest number in it."""
    pairs = zip(*map(jax.tree.leaves, (tree, reference)), strict=True)
    found = [np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]
    return float(np.max(found))  # NaN if any is


def in_turn(cases: Sequence[Case], samples: int, min_sample_s: float) -> list[Benchmark]:
    """Times all cases, a sample each a round, every other round from the last case to the first.

    Each turn begins with a step and a sample that do not count, after what another left in caches.
    """
    states, steps = [case.state for case in cases], [1] * len(cases)
    warmups, taken = ([[] for _ in cases] for _ in range(2))
    for number in range(samples + 1):  # in the first round they warm up
        for i in range(len(cases))[:: -1 if number % 2 else 1]:
            times, states[i] = timing.measure(
                cases[i].call,
                states[i],
                sync=jax.block_until_ready,
                samples=1,
                min_sample_s=min_sample_s,
                warmup_s=0.0 if number else 3.0,
                multiple_of=steps[i],
            )
            steps[i] = times.steps_per_sample
            warmups[i] += times.warmup_s
            (taken if number else warmups)[i].extend(times.samples_s)
    for case, count in zip(cases, steps, strict=True):
        case.details["steps_per_sample"] = count
    return [
        Benchmark.of(samples_s, warmup_s, details=case.details, **case.names)
        for case, samples_s, warmup_s in zip(cases, taken, warmups, strict=True)
    ]


def measure(options: Options) -> None:
    """Measures or predicts, prints the tables and writes the file."""
    first = devices.select_device(options.platform)
    found = jax.local_devices(backend=first.platform)
    virtual = first.platform == "cpu"
    counts = (
        [] if options.predict else device_counts(len(found), options.devices or (), first.platform)
    )
    recorder = Recorder(options.output, environment.describe(first))
    if virtual and counts:
        recorder.context["note"] = VIRTUAL
    predicted: list[dict[str, Any]] = []
    for job in step.jobs_of(options, ("many",), ("train",)):
        if options.predict:
            predicted += forecast.rows(job, options.assumed(job.batch_size), options, "assumed")
            continue
        with (
            step.left_out_if_impossible(recorder, step.describe(job)),
            jax.default_matmul_precision(devices.MATMUL_PRECISION[job.precision]),
        ):
            cases = list(cases_of(job, found, counts))
            timed = [recorder.add(b) for b in in_turn(cases, job.samples, job.min_sample_s)]
            if not virtual:
                predicted += forecast.rows(job, [fitted(timed)], options, "measured")
        recorder.write()
    for row in predicted:
        recorder.row("prediction", **row)
    recorder.write()
    launch.show(report(recorder.found))


def fitted(benchmarks: Sequence[Benchmark]) -> cost_model.StepTime:
    """What a step takes on one device, from those that one was timed with."""
    steps = [b for b in benchmarks if b.name == step.TRAIN]
    alone = [b for b in steps if b.details["kind"] == SHARE or b.details["devices"] == 1]
    return cost_model.fit([b.batch_size for b in alone], [b.median_s for b in alone])


def report(found: Results) -> list[Table | str]:
    """A table for each case measured, and one for each predicted."""
    cases: dict[tuple[Any, ...], list[Benchmark]] = {}
    for b in found.benchmarks:
        cases.setdefault((b.model, b.details["base"], b.precision), []).append(b)
    virtual = "note" in found.context
    parts: list[Table | str] = [_measured(case, virtual) for case in cases.values()]
    parts += [found.context["note"]] if virtual else []
    predicted: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found.tables.get("prediction", []):
        predicted.setdefault((row["model"], row["batch_size"], row["precision"]), []).append(row)
    return [*parts, *map(forecast.table, predicted.values()), *step.left_out(found)]


def _measured(benchmarks: Sequence[Benchmark], virtual: bool) -> Table:
    """Efficiency, or where devices share the cores what the same work takes over one device's."""
    by = {(b.details["kind"], b.details["devices"]): b for b in benchmarks}
    one = by[STRONG, 1]
    says = "cost" if virtual else "efficiency"
    title = f"{one.model}, {one.precision}, {one.batch_size} images a step on one device"
    table = Table(title=title, box=box.SIMPLE)
    headings = ["devices", "strong, ms", says, "95 %", "weak, ms", says, "95 %"]
    for heading in [*headings, "share alone, ms", "sum alone, ms", "gradients apart"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for count in sorted({count for _, count in by}):
        cells = [str(count)]
        for kind in (STRONG, WEAK):
            b = by.get((kind, count), one)
            # Efficiency: one's time over n's, and by n where n do the work of one. Cost: n's time
            # over one's, and by n where n do the work of n.
            sides, divided = ((b, one), WEAK) if virtual else ((one, b), STRONG)
            found = timing.ratio(*(side.samples_s for side in sides))
            middle, low, high = (r / (count if kind == divided else 1) for r in found)
            interval = f"{low:.3f} to {high:.3f}" if len(b.samples_s) >= step.FEW else "few"
            cells += [f"{1e3 * b.median_s:.4g}", f"{middle:.3f}", interval if count > 1 else ""]
        parts = (by.get((kind, count)) for kind in (SHARE, SUM))
        cells += [f"{1e3 * b.median_s:.4g}" if b else "" for b in parts]
        different = by[STRONG, count].details["gradients_apart"]
        table.add_row(*cells, f"{different:.1g}" if different else "")
    return table


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.scaling", __doc__ or ""))
