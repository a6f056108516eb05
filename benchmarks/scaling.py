"""Times a training step over several devices of this machine.

Strong scaling divides one batch among 1, 2, 4 … devices; weak scaling gives each device a batch.
The virtual devices of one CPU (JAX_NUM_CPU_DEVICES=8) show only what dividing the work costs.
"""

import argparse
from dataclasses import replace

import numpy as np

from benchmarks import launch, results, step, timing
from benchmarks.results import Recorder, Results


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures every case on one device and on more."""
    options.mode, options.what, most = ["many"], ["train"], recorder.found.context["devices"]
    counts = options.devices or [*(2**i for i in range(1, most.bit_length())), most]
    for job in step.jobs_of(options):
        for count in sorted({1, *counts}):
            strong = replace(job, devices=count)
            weak = replace(strong, batch_size=count * job.batch_size)
            details = {"devices": count, "base": job.batch_size}
            launch.measure_jobs(recorder, [strong], prefix="strong_", details=details)
            if count > 1:
                launch.measure_jobs(recorder, [weak], prefix="weak_", details=details)


def report(found: Results) -> list[str]:
    """Times, and those of one device divided by them: 1 for ideal weak scaling."""
    rows, alone_s = [], {}
    for b in found.benchmarks:
        s = timing.estimate(b.samples_s, found.context["platform"])
        kind, count, base = b.name.removesuffix(step.TRAIN), b.details["devices"], b.details["base"]
        if count == 1:
            alone_s[b.model, base, b.precision] = s
        one_s = alone_s.get((b.model, base, b.precision), np.nan)
        words = [b.model, str(base), b.precision, kind.strip("_"), str(count)]
        rows.append([*words, f"{1e3 * s:.4g}", f"{one_s / s:.3f}"])
    headings = ["model", "batch", "precision", "kind", "devices", "ms", "one device's time ÷ this"]
    return [results.table("Scaling over devices", headings, rows)]


if __name__ == "__main__":
    raise SystemExit(launch.main(__doc__, measure, f"{launch.CASES} devices", report))
