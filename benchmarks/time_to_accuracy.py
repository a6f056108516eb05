"""Seconds from first touching the data to an accuracy on the test images, as MLPerf counts them.

Each seed trains the preset's whole schedule; the clock stops at the first epoch that reaches the
target. It includes loading the data, not compiling. A seed that misses counts as infinite.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import launch, results
from benchmarks.results import Recorder, Results
from mnist_jax.callbacks import Callback
from mnist_jax.config import Config
from mnist_jax.errors import NonFiniteError
from mnist_jax.training import fit

TIMINGS = ("compile_s", "data_s", "train_s")
TARGETS = {"logistic": [0.92], "mlp": [0.975], "cnn": [0.99, 0.995]}


class Clock(Callback):
    """Reads the clock after every epoch: seconds since it was made, test accuracy."""

    def __init__(self):
        self._began_s = time.perf_counter()
        self.epochs: list[tuple[float, float]] = []

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch has been trained and evaluated."""
        self.epochs.append((time.perf_counter() - self._began_s, row["test/accuracy"]))


def run(repeats: int, **given: Any) -> dict[str, Any]:
    """Trains with each seed; returns the content of a result file."""
    rows, model = [], given["model"]
    case = {name: given[name] for name in ("preset", "precision", "batch_size")}
    case["model"] = f"{model}, {given['dataset']}"
    for seed in range(Config.seed, Config.seed + repeats):
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock()
            config = Config(seed=seed, workdir=Path(folder), **given)
            timings: dict[str, Any] = dict.fromkeys(TIMINGS)
            try:
                timings = fit(config, callbacks=[clock]).record["timings"]
            except NonFiniteError:  # it misses every target
                clock.epochs.clear()
        own = {"seed": seed, "epochs": clock.epochs, **{name: timings[name] for name in TIMINGS}}
        for target in TARGETS.get(model, [0.9]):
            # Everything is compiled before the first epoch ends.
            hits = (s - timings["compile_s"] for s, accuracy in clock.epochs if accuracy >= target)
            rows.append(case | own | {"target": target, "reached_s": next(hits, None)})
    return {"context": {}, "benchmarks": [], "tables": {"time_to_accuracy": rows}}


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Trains every network with --repeats seeds, in a process each."""
    given: dict[str, Any] = launch.flags_of_data(options)
    given |= {name: getattr(options, name) for name in ("preset", "platform", "repeats")}
    given["batch_size"] = options.batch_size and options.batch_size[0]
    given["precision"], function = options.precision[0], "benchmarks.time_to_accuracy:run"
    for model in options.model:
        with tempfile.TemporaryDirectory() as folder:  # all seeds but the first find the programs
            given["variables"] = {**launch.shared_cache(folder), **recorder.variables}  # a suite's
            launch.measure(recorder, function, model, **given, model=model)


def times_of(found: Results) -> dict[tuple[str, str, float], list[float]]:
    """By network, preset and target: the seconds of each seed, infinite if it was not reached."""
    times: dict[tuple[str, str, float], list[float]] = {}
    for row in found.tables.get("time_to_accuracy", []):
        case = row["model"], row["preset"], row["target"]
        times.setdefault(case, []).append(row["reached_s"] or float("inf"))
    return times


def summary(model: str, preset: str, target: float, times_s: list[float]) -> str:
    """What the seeds of one case say in a line."""
    reached = f"{np.isfinite(times_s).sum()} of {len(times_s)} seeds"
    return f"{model} {target:.1%} in {np.median(times_s):.3g} s ({preset}, {reached})"


def report(found: Results) -> list[str]:
    """The table."""
    rows, seeds = [], found.tables.get("time_to_accuracy", [])
    compiling = {row["model"]: row["compile_s"] for row in reversed(seeds) if row["compile_s"]}
    for (model, preset, target), times_s in times_of(found).items():
        reached = f"{np.isfinite(times_s).sum()} of {len(times_s)}"
        low, high = results.interval95(times_s) or (min(times_s), max(times_s))
        seconds = [f"{np.median(times_s):.3g}", f"{low:.3g} to {high:.3g}"]
        seconds.append(f"{compiling.get(model, np.nan):.2g}")
        rows.append([model, preset, f"{target:.2%}", reached, *seconds])
    headings = ["model", "preset", "target", "reached", "median s", "range, or 95 % of 6 or more"]
    title = "Seconds to an accuracy on the test images"
    return [results.table(title, [*headings, "first compilation s"], rows)]


if __name__ == "__main__":
    flags = f"{launch.ONE_CASE} repeats {launch.FORK} preset"
    raise SystemExit(launch.main(__doc__, measure, flags, report, batch_size=None, repeats=3))
