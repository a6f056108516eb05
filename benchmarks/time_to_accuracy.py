"""Seconds from first touching the data to an accuracy on the test images, as MLPerf counts them.

    python -m benchmarks.time_to_accuracy --model mlp --output FILE

The schedule is fixed: all of a preset's epochs, each followed by an evaluation, and the clock stops
at the first epoch that reaches the target. It runs from the data set's load on and holds training,
evaluation and all that lies between; compilation is taken out and shown apart. Each seed is a run
of its own; one that never reaches the target counts as failed and in no mean.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table

from benchmarks import launch
from benchmarks.results import Recorder, Results
from mnist_jax.config import Config
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment
from mnist_jax.training import Callback, fit

TARGETS = {"logistic": (0.92,), "mlp": (0.975,), "cnn": (0.99, 0.994, 0.995)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    model: tuple[launch.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to train."""
    targets: tuple[float, ...] | None = None
    """Shares of the test images to get right, such as 0.99. None: 0.92 for logistic, 0.975 for mlp,
    0.99, 0.994 and 0.995 for cnn."""
    preset: Literal["tutorial", "fast", "best"] = "tutorial"
    """The recipe, and with it the number of epochs."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of products."""
    batch_size: int | None = None
    """Images a training step. None: the preset's."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Device to run on; auto: the best that JAX finds."""
    repeats: int = 3
    """Runs of each network, with seeds from 1234 on."""


class Clock(Callback):
    """Reads the clock at the data set's load and after every epoch."""

    def __init__(self):
        self.loaded_s = 0.0
        self.epochs: list[tuple[float, float]] = []  # seconds since then, test accuracy

    def on_load(self, config: Config) -> None:
        """The data are touched next."""
        self.loaded_s = time.perf_counter()

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch has been trained and evaluated."""
        self.epochs.append((time.perf_counter() - self.loaded_s, row["test/accuracy"]))

    def reached_s(self, target: float, compile_s: float) -> float | None:
        """When the target was reached; all is compiled before the first epoch ends."""
        return next((s - compile_s for s, accuracy in self.epochs if accuracy >= target), None)


def measure(options: Options) -> None:
    """Trains every network with every seed, prints the table and writes the file."""
    device = devices.select_device(options.platform)
    data = options.prepare()
    context = environment.describe(device) | {"dataset": data["dataset"]}
    recorder = Recorder(options.output, context)
    given: dict[str, Any] = {"batch_size": options.batch_size}  # None: the preset's
    for model in options.model:
        for seed in range(1234, 1234 + options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                config = Config(
                    model=model,
                    preset=options.preset,
                    precision=options.precision,
                    platform=options.platform,
                    seed=seed,
                    workdir=Path(folder) / "run",
                    **data,
                    **given,
                )
                clock = Clock()
                record = fit(config, observer=clock).record
            compile_s = record["timings"]["compile_s"]
            for target in options.targets or TARGETS[model]:
                reached_s = clock.reached_s(target, compile_s)
                recorder.row(
                    "time_to_accuracy",
                    model=model,
                    batch_size=config.batch_size,
                    precision=config.precision,
                    preset=config.preset,
                    seed=seed,
                    target=target,
                    reached_s=reached_s,
                    compile_s=compile_s,
                    data_s=record["timings"]["data_s"],
                    train_s=record["timings"]["train_s"],
                    epochs=clock.epochs,
                )
                said = "not reached" if reached_s is None else f"{reached_s:.3g} s"
                launch.say(f"{model}, seed {seed}, {target:.2%}: {said}")
            recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table | str]:
    """The table."""
    rows = found.tables["time_to_accuracy"]
    table = Table(title="seconds to an accuracy on the test images", box=box.SIMPLE)
    for heading in ("model", "preset", "target", "reached", "mean s", "sd", "compiling s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in dict.fromkeys((row["model"], row["preset"], row["target"]) for row in rows):
        some = [row for row in rows if (row["model"], row["preset"], row["target"]) == case]
        times = [row["reached_s"] for row in some if row["reached_s"] is not None]
        mean = f"{np.mean(times):.3g}" if times else "-"
        sd = f"{np.std(times, ddof=1):.2g}" if len(times) > 1 else "-"
        compiling = f"{np.median([row['compile_s'] for row in some]):.2g}"
        model, preset, target = case
        reached = f"{len(times)} of {len(some)}"
        table.add_row(model, preset, f"{target:.2%}", reached, mean, sd, compiling)
    return [table]


if __name__ == "__main__":
    prog = "python -m benchmarks.time_to_accuracy"
    sys.exit(launch.command(Options, measure, prog, __doc__ or ""))
