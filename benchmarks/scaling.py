"""Times a training step over several devices of this machine, and the sum over them alone.

    python -m benchmarks.scaling --model cnn --output FILE

Strong scaling divides one batch among 1, 2, 4 … devices; weak scaling gives each device a batch.
The sum over the devices alone is of arrays like the gradients. On the virtual devices of one CPU
(JAX_NUM_CPU_DEVICES=8) no efficiency can be measured, only what dividing the work costs.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from benchmarks import launch, results, step, timing
from benchmarks.results import Recorder, Results
from benchmarks.workers import job as jobs
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.parallel import mesh as meshes

STRONG, WEAK, SUM = "strong_", "weak_", "all_reduce_"  # prefixes of the benchmarks' names
SUMS_A_CALL = 100


def sum_alone(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The mean over the devices of arrays like a model's gradients, in place of a training step.

    Each mean needs the one before, so the compiler can leave none out.
    """
    first = meshes.select_device(job.platform)
    mesh = meshes.make_mesh(meshes.select_devices(first, job.devices))
    axes = PartitionSpec(*mesh.axis_names)

    def means(arrays: Any) -> Any:
        def turn(_: Any, here: Any) -> Any:
            return jax.tree.map(lambda x: lax.pmean(x, mesh.axis_names), here)

        return lax.fori_loop(0, SUMS_A_CALL, turn, arrays)

    program = jax.shard_map(means, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    program = jax.jit(program, donate_argnums=0)
    shapes = param_shapes(MODELS[job.model]())
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    start = jax.tree.map(lambda x: jax.random.normal(next(keys), (mesh.size, *x.shape)), shapes)
    start = jax.device_put(start, meshes.sharded(mesh))

    def train(state: Any, count: int) -> Any:
        for _ in range(count // SUMS_A_CALL):  # calls in flight block each other on one CPU
            state = jax.block_until_ready(program(state))
        return state

    return jobs.Workload(state=start, train=train, sync=jax.block_until_ready, unit=SUMS_A_CALL)


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures every case on one device and on more."""
    options.mode, options.what, most = ["many"], ["train"], recorder.found.context["devices"]
    counts = options.devices or [2**i for i in range(1, most.bit_length())]
    for job in step.jobs_of(options):
        for count in sorted({1, *counts}):
            divided = replace(job, devices=count)
            whole = replace(divided, batch_size=count * job.batch_size)
            own: dict[str, Any] = {"details": {"devices": count, "base": job.batch_size}}
            launch.measure_jobs(recorder, [divided], prefix=STRONG, **own)
            if count > 1:
                launch.measure_jobs(recorder, [whole], prefix=WEAK, **own)
                sums = "benchmarks.scaling:sum_alone"
                launch.measure_jobs(recorder, [divided], sums, prefix=SUM, **own)


def report(found: Results) -> list[str]:
    """Times, and those of one device divided by them: 1 for ideal weak scaling."""
    rows, alone_s = [], {}
    for b in found.benchmarks:
        s = timing.estimate(b.samples_s, found.platform)
        kind, count, base = b.name.removesuffix(step.TRAIN), b.details["devices"], b.details["base"]
        one_s = alone_s.setdefault((b.model, base, b.precision), s)
        ratio = "-" if kind == SUM else f"{one_s / s:.3f}"
        words = [b.model, str(base), b.precision, kind.strip("_"), str(count)]
        rows.append([*words, f"{1e3 * s:.4g}", ratio])
    headings = ["model", "batch", "precision", "kind", "devices", "ms", "one device's time ÷ this"]
    return [results.table("Scaling over devices", headings, rows)]


if __name__ == "__main__":
    sys.exit(launch.main(__doc__, measure, f"{launch.CASES} devices", report))
