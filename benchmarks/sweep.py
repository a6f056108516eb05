"""Times training steps by batch size and fits the law t = a + b·B to them.

a is the time of a step that does not depend on the batch, b the time of an image, 1/b the highest
throughput; a/b is the batch at which half of it is reached.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from benchmarks import launch, results, step
from benchmarks.results import Case, Recorder, Results

PREFIX = "sweep_"
SATURATED, POOR_FIT = 0.9, 0.15  # shares of the highest throughput, and of a measured time


class Law(NamedTuple):
    """t = a_s + b_s · batch, and how well it describes the measurements."""

    a_s: float  # seconds a step
    b_s: float  # seconds an image
    error: float  # the largest relative difference from a measured time
    saturated: int | None  # batch from which throughput is 90 % of the highest, if not the largest
    largest: int  # batch measured

    def __str__(self) -> str:
        half = f"half speed at batch {self.a_s / self.b_s:.3g}" if self.b_s else "constant"
        fit = f"but the fit misses by up to {self.error:.0%}" if self.error > POOR_FIT else half
        reached = f"not saturated at batch {self.largest}, the largest measured"
        if self.saturated:
            reached = f"90 % of the highest throughput at batch {self.saturated}"
        return f"t = {1e6 * self.a_s:.3g} µs + {1e6 * self.b_s:.3g} µs · B, {fit}, {reached}"


def fit(batches: Sequence[int], times_s: Sequence[float]) -> Law | None:
    """The law with the least squared relative errors, neither part below 0; None of few sizes."""
    if len(batches) < 3:  # any two lie on a line
        return None
    batch, times = np.asarray(batches), np.asarray(times_s)
    columns = np.stack([np.ones(len(times)), batch], axis=1) / times[:, None]
    (a_s, b_s), _ = nnls(columns, np.ones(len(times)))
    error = float(np.max(np.abs((a_s + b_s * batch) / times - 1)))
    fast, largest = SATURATED * np.max(batch / times) <= batch / times, int(batch.max())
    first = min(int(x) for x in batch if fast[(batch >= x) & (batch <= batch[fast].max())].all())
    return Law(float(a_s), float(b_s), error, first if first < largest else None, largest)


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures every network and batch size."""
    options.mode, options.what = ["many"], ["train"]
    step.measure(options, recorder, PREFIX)


def sweeps(found: Results) -> dict[tuple[str, str], tuple[list[Case], Law | None]]:
    """The cases of each network and precision, by rising batch, and their law."""
    grouped: dict[tuple[str, str], list[Case]] = {}
    for case in sorted(found.cases(PREFIX + step.TRAIN), key=lambda case: case.first.batch_size):
        grouped.setdefault((case.first.model, case.first.precision), []).append(case)
    return {
        who: (some, fit([x.first.batch_size for x in some], [x.seconds for x in some]))
        for who, some in grouped.items()
    }


def report(found: Results) -> list[str]:
    """A table, and the law of each sweep."""
    rows, lines = [], []
    for (model, precision), (cases, law) in sweeps(found).items():
        for case in cases:
            size, s = case.first.batch_size, case.seconds
            numbers = [str(size), f"{1e3 * s:.4g}", f"{1e6 * s / size:.4g}", f"{size / s:,.0f}"]
            rows.append([model, precision, *numbers])
        lines.append(f"- {model}, {precision}: {law or 'no law of fewer than 3 sizes'}")
    headings = ["model", "precision", "batch", "ms", "µs an image", "images/s"]
    return [results.table("Training steps by batch", headings, rows), "\n".join(lines)]


if __name__ == "__main__":
    defaults = {"batch_size": [2**i for i in range(14)], "repeats": 20}
    raise SystemExit(launch.main(__doc__, measure, launch.CASES, report, **defaults))
