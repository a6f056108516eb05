"""Times a training step over several devices of this machine, and the sum over them alone.

    python -m benchmarks.scaling --model cnn --output FILE

Strong scaling divides one batch among 1, 2, 4 … devices; weak scaling gives each device a batch.
The sum over the devices alone is of arrays like the gradients. On the virtual devices of one CPU
(JAX_NUM_CPU_DEVICES=8) no efficiency can be measured, only what dividing the work costs.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from benchmarks import launch, results, step, timing
from benchmarks.results import Benchmark, Recorder, Results
from benchmarks.workers import job as jobs
from mnist_jax.errors import DeviceError
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.parallel import mesh as meshes

STRONG, WEAK, SUM = "strong", "weak", "all_reduce"
SUMS_A_CALL = 100


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


def time_sum(job: jobs.Job, devices: Sequence[jax.Device]) -> Benchmark:
    """The sum over the devices of arrays like a model's gradients."""
    program, start = sum_alone(param_shapes(MODELS[job.model]()), devices)

    def call(state: Any, count: int) -> Any:
        for _ in range(count // SUMS_A_CALL):
            state = program(state)
        return state

    limits: dict[str, Any] = {"samples": job.samples, "budget_s": job.budget_s}
    sync = jax.block_until_ready
    times, _ = timing.measure(call, start, sync=sync, unit=SUMS_A_CALL, **limits)
    fields = step.named(job, SUM)
    return Benchmark(samples_s=times.samples_s, warmup_s=times.warmup_s, **fields)


def measure(options: argparse.Namespace) -> None:
    """Measures every case, prints the table and writes the file.

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
    options.mode, options.what, options.slow_down = ["many"], ["train"], 0.0
    for job, count in itertools.product(step.jobs_of(options), sorted({1, *counts})):
        devices = found[:count]
        sizes = {STRONG: job.batch_size, WEAK: count * job.batch_size}
        with step.excluding(recorder, f"{job.model}, {count} devices"):
            made = [
                (kind, step.time_job(dataclasses.replace(job, batch_size=size), devices=devices)[0])
                for kind, size in sizes.items()
                if count > 1 or kind == STRONG
            ]
            made += [(SUM, time_sum(job, devices))] if count > 1 else []
            for kind, b in made:
                details = b.details | {"kind": kind, "devices": count, "base": job.batch_size}
                recorder.add(dataclasses.replace(b, mode=f"{kind}, {count}", details=details))
        recorder.write()
    recorder.finish(report)


def report(found: Results) -> list[str]:
    """Times, and those of one device divided by them: 1 for ideal weak scaling."""
    rows, alone_s = [], {}
    for case in found.cases(step.TRAIN, SUM):
        b, s = case.first, case.seconds
        kind, count, base = (b.details[name] for name in ("kind", "devices", "base"))
        one_s = alone_s.setdefault((b.model, base, b.precision), s)
        ratio = "-" if kind == SUM else f"{one_s / s:.3f}"
        rows.append([b.model, str(base), b.precision, kind, str(count), f"{1e3 * s:.4g}", ratio])
    headings = ["model", "batch", "precision", "kind", "devices", "ms", "one device's time ÷ this"]
    return [results.table("Scaling over devices", headings, rows)]


if __name__ == "__main__":
    sys.exit(launch.main(__doc__, measure, f"{launch.CASES} devices"))
