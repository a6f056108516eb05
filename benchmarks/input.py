"""Three ways to feed the same batches: how fast each is, and whether the parameters agree.

    python -m benchmarks.input --model mlp --output FILE

host arrays: each batch is gathered by NumPy and handed to a compiled step. resident: the images
lie on the device and a step gathers its own batch, a dispatch a step. many steps: the same, a
whole sample in one call. All train on the same images in the same order from the same parameters.
"""

import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks import launch, step, timing
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.optimizer import make_optimizer, step_config
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment

HOST = "host arrays"
RESIDENT = {HOST: "", "resident": ours.ONE, "many steps": ours.MANY}
COMPARED_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""


def host_arrays(job: jobs.Job, data: jobs.Data, device: jax.Device) -> jobs.Workload:
    """One compiled `steps.train_step`, fed by the host."""
    config = Config(model=job.model, batch_size=job.batch_size, precision=job.precision)
    key = jax.device_put(jax.random.key(config.seed), device)
    init_state = ours.programs(config, device, job.train_size).init_state
    dtype = devices.compute_dtype(job.precision, device)
    train_step = jax.jit(
        partial(
            steps.train_step,
            model=ours.MODELS[job.model](dtype=dtype, **config.model_options()),
            tx=make_optimizer(config, 1),
            recipe=step_config(config),
        ),
        donate_argnums=0,
    )
    mask = np.ones(job.batch_size, bool)

    def train(state: steps.TrainState, count: int) -> steps.TrainState:
        for i in range(count):
            index = data.batch_index(i, job.batch_size)
            batch = {"image": data.image[index], "label": data.label[index], "mask": mask}
            state, _ = train_step(state, jax.device_put(batch, device), key)
        return state

    return jobs.Workload(init_state(key), train, train, jax.block_until_ready, {})


def workload(job: jobs.Job, data: jobs.Data, device: jax.Device) -> jobs.Workload:
    """The way of feeding that the job names."""
    if job.mode == HOST:
        return host_arrays(job, data, device)
    return ours.make(dataclasses.replace(job, mode=RESIDENT[job.mode]), data, device)


def measure(options: Options) -> None:
    """Times the three ways, compares what they trained, prints the table and writes the file."""
    device = devices.select_device(options.platform)
    recorder = Recorder(options.output, environment.describe(device))
    for base in step.jobs_of(options, ("many",), ("train",)):
        reference: Any = None
        data = jobs.make_data(base)
        for mode in RESIDENT:
            job = dataclasses.replace(base, mode=mode)
            precision = devices.MATMUL_PRECISION[job.precision]
            with (
                step.left_out_if_impossible(recorder, step.describe(job)),
                jax.default_matmul_precision(precision),
            ):
                fed = workload(job, data, device)
                trained = jax.device_get(fed.train(fed.state, COMPARED_STEPS).params)
                reference = reference or trained
                apart = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), trained, reference)
                fed = workload(job, data, device)  # the state was donated
                samples = {"samples": options.repeats, "budget_s": job.budget_s}
                times, _ = timing.measure(
                    fed.train,
                    fed.state,
                    sync=fed.sync,
                    min_sample_s=job.min_sample_s,
                    warmup_s=job.warmup_s,
                    **samples,
                )
                details = {
                    "steps_per_sample": times.steps_per_sample,
                    "largest_difference": float(np.max(jax.tree.leaves(apart))),
                    "compared_steps": COMPARED_STEPS,
                }
                names = step.named(job, step.TRAIN)
                recorder.add(
                    Benchmark.of(times.samples_s, times.warmup_s, details=details, **names)
                )
        recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table | str]:
    """The table."""
    title = f"input; parameters after {COMPARED_STEPS} steps against those of the first way"
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("model", "way", "ms a step", "ratio", "largest difference"):
        table.add_column(heading, no_wrap=True)
    first: dict[tuple[Any, ...], float] = {}
    for b in found.benchmarks:
        base_s = first.setdefault((b.model, b.batch_size, b.precision), b.median_s)
        apart = b.details["largest_difference"]
        ms, ratio = f"{1e3 * b.median_s:.4g}", f"{b.median_s / base_s:.2f}"
        table.add_row(b.model, b.mode, ms, ratio, "none" if apart == 0 else f"{apart:.1g}")
    return [table, *step.left_out(found)]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.input", __doc__ or ""))
