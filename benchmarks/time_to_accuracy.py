"""Seconds from first touching the data to an accuracy on the test images, as MLPerf counts them.

    python -m benchmarks.time_to_accuracy --model mlp --output FILE

Each seed trains the preset's whole schedule with an evaluation after every epoch; the clock stops
at the first epoch that reaches the target. It starts before the data set is loaded and includes
everything but compilation, which is shown apart; seeds after the first read the compiled programs
from a cache. The median counts a seed that never reaches the target as infinite.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import launch, results, timing
from benchmarks.results import Recorder, Results
from mnist_jax.callbacks import Callback
from mnist_jax.config import Config
from mnist_jax.parallel import mesh
from mnist_jax.training import fit

TARGETS = {"logistic": [0.92], "mlp": [0.975], "cnn": [0.99, 0.995]}
FIRST_SEED = 1234


class Clock(Callback):
    """Reads the clock when `fit` begins and after every epoch."""

    def __init__(self):
        self.began_s = 0.0
        self.epochs: list[tuple[float, float]] = []  # seconds since then, test accuracy

    def on_fit_begin(self, config: Config) -> None:
        """The data are loaded next."""
        self.began_s = time.perf_counter()

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch has been trained and evaluated."""
        self.epochs.append((time.perf_counter() - self.began_s, row["test/accuracy"]))

    def reached_s(self, target: float, compile_s: float) -> float | None:
        """When the target was reached; everything is compiled before the first epoch ends."""
        return next((s - compile_s for s, accuracy in self.epochs if accuracy >= target), None)


def measure(options: argparse.Namespace) -> None:
    """Trains every network with --repeats seeds, prints the table and writes the file."""
    context = launch.describe(mesh.select_device(options.platform))
    data = launch.prepare_data(options)
    recorder = Recorder(options.output, context | {"dataset": data["dataset"]})
    given: dict[str, Any] = {"preset": options.preset, "precision": options.precision[0], **data}
    given |= {"platform": options.platform, "batch_size": (options.batch_size or [None])[0]}
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for model in options.model:
            for seed in range(FIRST_SEED, FIRST_SEED + options.repeats):
                workdir = Path(folder) / f"{model}-{seed}"
                clock = Clock()
                config = Config(model=model, seed=seed, workdir=workdir, **given)
                timings = fit(config, callbacks=[clock]).record["timings"]
                seconds = {name: timings[name] for name in ("compile_s", "data_s", "train_s")}
                for target in options.targets or TARGETS.get(model, [0.9]):
                    case = {"model": model, "seed": seed, "target": target} | seconds
                    case |= {name: given[name] for name in ("preset", "precision", "batch_size")}
                    reached_s = clock.reached_s(target, seconds["compile_s"])
                    recorder.row(
                        "time_to_accuracy", **case, reached_s=reached_s, epochs=clock.epochs
                    )
                    results.say(f"{model}, seed {seed}, {target:.2%}: {reached_s} s")
                recorder.write()
    recorder.finish(report)


def times_of(found: Results) -> dict[tuple[str, str, float], list[float]]:
    """By network, preset and target: the seconds of each seed, infinite if it was not reached."""
    times: dict[tuple[str, str, float], list[float]] = {}
    for row in found.tables.get("time_to_accuracy", []):
        reached_s = float("inf") if row["reached_s"] is None else row["reached_s"]
        times.setdefault((row["model"], row["preset"], row["target"]), []).append(reached_s)
    return times


def summary(model: str, preset: str, target: float, times_s: list[float]) -> str:
    """What the seeds of one case say in a line."""
    reached = f"{np.isfinite(times_s).sum()} of {len(times_s)} seeds"
    return f"{model} {target:.1%} in {np.median(times_s):.3g} s ({preset}, {reached})"


def report(found: Results) -> list[str]:
    """The table."""
    rows = []
    compiling = {r["model"]: r["compile_s"] for r in found.tables["time_to_accuracy"][::-1]}
    for (model, preset, target), times_s in times_of(found).items():
        reached = f"{np.isfinite(times_s).sum()} of {len(times_s)}"
        low, high = timing.interval95(times_s) or (min(times_s), max(times_s))
        seconds = [f"{np.median(times_s):.3g}", f"{low:.3g} to {high:.3g}"]
        rows.append([model, preset, f"{target:.2%}", reached, *seconds, f"{compiling[model]:.2g}"])
    headings = ["model", "preset", "target", "reached", "median s", "range, or 95 % of 6 or more"]
    title = "Seconds to an accuracy on the test images"
    return [results.table(title, [*headings, "first compilation s"], rows)]


if __name__ == "__main__":
    flags = f"{launch.CASES} {launch.DATA} preset targets"
    sys.exit(launch.main(__doc__, measure, flags, batch_size=None, repeats=3))
