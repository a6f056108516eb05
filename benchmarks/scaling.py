"""Times a training step over several devices of this machine, and the sum over them alone.

    python -m benchmarks.scaling --model cnn --output FILE

Strong scaling divides one batch among 1, 2, 4 … devices; weak scaling gives each device a batch.
The sum over the devices alone is of arrays like the gradients. All cases take turns, a sample each
a round, so that a disturbance reaches all of them. On the virtual devices of one CPU
(JAX_NUM_CPU_DEVICES=8) no efficiency can be measured, only what dividing the work costs.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec

from benchmarks import launch, results, step, timing
from benchmarks.results import Benchmark, Recorder, Results
from benchmarks.workers import job as jobs
from benchmarks.workers import ours
from mnist_jax.errors import DeviceError
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.parallel import mesh as meshes

STRONG, WEAK, SUM = "strong", "weak", "all_reduce"
SUMS_A_CALL = 100


class Case(NamedTuple):
    """Something timed in turn with others: its benchmark's fields, (state, steps) → state, unit."""

    fields: dict[str, Any]
    call: Callable[[Any, int], Any]
    state: Any
    unit: int


def sum_alone(shapes: Any, devices: Sequence[jax.Device]) -> tuple[Any, Any]:
    """A program of the mean over the devices, `SUMS_A_CALL` times, and arrays to start from.

    Each mean needs the one before, so the compiler can leave none out.

    Args:
        shapes: of the arrays, such as gradients; every device has its own.
        devices: two or more.
    """
    mesh = meshes.make_mesh(devices)
    axes = PartitionSpec(*mesh.axis_names)

    def means(arrays: Any) -> Any:
        def turn(_: Any, here: Any) -> Any:
            return jax.tree.map(lambda x: lax.pmean(x, mesh.axis_names), here)

        return lax.fori_loop(0, SUMS_A_CALL, turn, arrays)

    program = jax.shard_map(means, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    start = jax.tree.map(lambda x: jax.random.normal(next(keys), (mesh.size, *x.shape)), shapes)
    return jax.jit(program, donate_argnums=0), jax.device_put(start, meshes.sharded(mesh))


def cases_of(job: jobs.Job, found: Sequence[jax.Device], counts: Sequence[int]) -> Iterator[Case]:
    """What is measured of a job; its `batch_size` is the images of a step on one device."""
    data = jobs.make_data(job)
    for count in counts:
        devices = found[:count]
        for kind, images in ((STRONG, job.batch_size), (WEAK, count * job.batch_size)):
            if count == 1 and kind == WEAK:
                continue
            one = dataclasses.replace(job, batch_size=images, mode=ours.MANY)
            made = ours.make(one, data, devices)
            details = {"kind": kind, "devices": count, "base": job.batch_size}
            fields = step.named(one) | {"mode": f"{kind}, {count}", "details": details}
            yield Case(fields, made.train, made.state, made.unit)
        if count > 1:
            program, start = sum_alone(param_shapes(MODELS[job.model]()), devices)

            def call(state: Any, steps: int, program: Any = program) -> Any:
                for _ in range(steps // SUMS_A_CALL):
                    state = program(state)
                return state

            details = {"kind": SUM, "devices": count, "base": job.batch_size}
            fields = step.named(job, SUM) | {"mode": f"{count} devices", "details": details}
            yield Case(fields, call, start, SUMS_A_CALL)


def in_turn(cases: Sequence[Case], samples: int, min_sample_s: float) -> list[Benchmark]:
    """Times all cases, a sample each a round, every other round from the last case to the first."""
    states, units = [case.state for case in cases], [case.unit for case in cases]
    warmups, taken = ([[] for _ in cases] for _ in range(2))
    for number in range(samples + 1):  # in the first round they warm up
        for i in range(len(cases))[:: -1 if number % 2 else 1]:
            times, states[i] = timing.measure(
                cases[i].call,
                states[i],
                sync=jax.block_until_ready,
                unit=units[i],
                samples=1,
                min_sample_s=min_sample_s,
                warmup_s=(0.0, 0.0 if number else 3.0),
            )
            units[i] = times.steps_per_sample
            warmups[i] += times.warmup_s
            (taken if number else warmups)[i].extend(times.samples_s)
    pairs = zip(cases, taken, warmups, strict=True)
    return [Benchmark(samples_s=s, warmup_s=w, **case.fields) for case, s, w in pairs]


def measure(options: argparse.Namespace) -> None:
    """Measures every case, prints the tables and writes the file.

    Raises:
        DeviceError: there are too few devices.
    """
    first = meshes.select_device(options.platform)
    found = jax.local_devices(backend=first.platform)
    counts = options.devices or [2**i for i in range(1, len(found).bit_length())] or [2]
    if max(counts) > len(found):
        raise DeviceError(
            f"{max(counts)} devices are needed; JAX finds {len(found)} of {first.platform}; on a "
            f"CPU set JAX_NUM_CPU_DEVICES={max(8, *counts)} in the environment"
        )
    recorder = Recorder(options.output, launch.describe(first))
    options.mode, options.what, options.seeds, options.slow_down = ["many"], ["train"], None, 0.0
    for job in step.jobs_of(options):
        precision = meshes.MATMUL_PRECISION[job.precision]
        with step.excluding(recorder, job.model), jax.default_matmul_precision(precision):
            cases = list(cases_of(job, found, sorted({1, *counts})))
            for benchmark in in_turn(cases, job.samples, job.min_sample_s):
                recorder.add(benchmark)
        recorder.write()
    recorder.finish(report)


def report(found: Results) -> list[str]:
    """Times, and the ratio of one device's step to several devices': 1 for ideal weak scaling."""
    grouped: dict[tuple[Any, ...], dict[tuple[str, int], Benchmark]] = {}
    for b in found.benchmarks:
        case = b.model, str(b.details["base"]), b.precision
        grouped.setdefault(case, {})[b.details["kind"], b.details["devices"]] = b
    rows = []
    for case, by in grouped.items():
        one = by[STRONG, 1]
        for (kind, count), b in by.items():
            cells = [*case, kind, str(count), f"{1e3 * b.summary.median_s:.4g}"]
            if kind != SUM:
                ratios = timing.paired_ratio(one.samples_s, b.samples_s)
                cells.append("{:.3f} ({:.3f} to {:.3f})".format(*ratios))
            rows.append([*cells, ""][:7])
    headings = ["model", "batch", "precision", "kind", "devices", "ms", "one device's time ÷ this"]
    return [results.table("Scaling over devices", headings, rows)]


if __name__ == "__main__":
    sys.exit(launch.main(__doc__, measure, f"{launch.CASES} devices"))
