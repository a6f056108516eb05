"""Sweeps the batch size: where throughput saturates, where memory ends, what an image costs.

    python -m benchmarks.batch_size --model mlp --output FILE

Training steps, many a call. With several --platforms, the batch from which on the later one is the
faster is named as well.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Literal

import jax
from rich import box
from rich.table import Table

from benchmarks import launch, step
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.mesh import Layout
from mnist_jax.runs import environment

SATURATED = 0.9  # of the highest throughput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""

    batch_size: tuple[int, ...] = tuple(2**i for i in range(14))
    """Images a training step; one or several."""
    platforms: tuple[Literal["cpu", "gpu", "tpu"], ...] | None = None
    """Devices to sweep, such as cpu gpu. None: that of --platform."""


def measure(options: Options) -> None:
    """Sweeps every network on every platform, prints the tables and writes the file."""
    platforms = options.platforms or (options.platform,)
    recorder = Recorder(options.output, environment.describe(devices.select_device(platforms[-1])))
    for platform in platforms:
        with step.left_out_if_impossible(recorder, platform):
            sweep(options, devices.select_device(platform), recorder)
    launch.show(report(recorder.found))


def sweep(options: Options, device: jax.Device, recorder: Recorder) -> None:
    """Measures all on one device."""
    for job in step.jobs_of(options, ("many",), ("train",)):
        with step.left_out_if_impossible(recorder, f"{step.describe(job)}, {device.platform}"):
            for benchmark in step.time_job(job, Layout((device,)), platform=device.platform):
                recorder.add(benchmark)
        recorder.write()


def saturation(sweep: Sequence[Benchmark]) -> int:
    """The smallest batch with 90 % of the highest throughput of a sweep."""
    speeds = {b.batch_size: b.batch_size / b.median_s for b in sweep}
    return min(size for size, speed in speeds.items() if speed >= SATURATED * max(speeds.values()))


def crossover(first: Sequence[Benchmark], second: Sequence[Benchmark]) -> int | None:
    """The batch from which on the second sweep is the faster at every size; None if at none."""
    times = {b.batch_size: b.median_s for b in first}
    wins = {b.batch_size: b.median_s < times[b.batch_size] for b in second if b.batch_size in times}
    lost = max((size for size, won in wins.items() if not won), default=0)
    return min((size for size, won in wins.items() if won and size > lost), default=None)


def report(found: Results) -> list[Table | str]:
    """A table for each network and precision, and what it says."""
    parts: list[Table | str] = []
    for case in dict.fromkeys((b.model, b.precision) for b in found.benchmarks):
        parts += _of_one([b for b in found.benchmarks if (b.model, b.precision) == case])
    return [*parts, *step.left_out(found)]


def _of_one(benchmarks: Sequence[Benchmark]) -> list[Table | str]:
    sweeps: dict[str, list[Benchmark]] = {}
    for b in benchmarks:
        sweeps.setdefault(b.details["platform"], []).append(b)
    one = benchmarks[0]
    table = Table(title=f"{one.model}, {one.precision}: a training step", box=box.SIMPLE)
    for heading in ("platform", "batch", "ms", "µs an image", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for b in benchmarks:
        cost, speed = 1e6 * b.median_s / b.batch_size, b.batch_size / b.median_s
        cells = b.details["platform"], str(b.batch_size), f"{1e3 * b.median_s:.4g}"
        table.add_row(*cells, f"{cost:.4g}", f"{speed:,.0f}")
    parts: list[Table | str] = [table]
    for platform, sweep in sweeps.items():
        size = saturation(sweep)
        parts.append(f"{platform}: from batch {size} on within 10 % of the highest throughput")
    names = list(sweeps)
    for before, after in itertools.pairwise(names):
        size = crossover(sweeps[before], sweeps[after])
        where = "at no batch measured" if size is None else f"from batch {size} on"
        parts.append(f"{after} is faster than {before} {where}")
    return parts


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.batch_size", __doc__ or ""))
