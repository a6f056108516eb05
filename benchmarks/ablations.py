"""What each part of the tutorial's recipe is worth: one changed at a time, many seeds each.

    python -m benchmarks.ablations --output FILE --manual_dir DIR

A row is one command, such as `python train.py --model=mlp --activation=sigmoid --seeds=10`; the
file holds every seed's accuracy on the test images after the last epoch. Nothing is chosen by it:
all rows are shown. The difference to the model's first row stands with Welch's 95 % interval.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks import launch
from benchmarks.results import Recorder, Results
from mnist_jax.config import Config
from mnist_jax.runs import environment
from mnist_jax.runs.statistics import welch
from mnist_jax.training import fit

# What changes, by model. The first row of each is the tutorial's recipe.
ABLATIONS: dict[str, list[dict[str, Any]]] = {
    "logistic": [
        {},
        {"normalize": False},
        {"batch_size": 10},
        {"batch_size": 1000},
        {"learning_rate": 1e-4},
        {"learning_rate": 1e-2},
    ],
    "mlp": [
        {},
        {"normalize": False},
        {"activation": "sigmoid"},
        {"dropout": 0.5},
        {"hidden_sizes": (256,)},
        {"hidden_sizes": (256, 128)},
        {"hidden_sizes": (256, 128, 64, 32, 32, 32)},
        {"hidden_sizes": (256, 128, 64, 32, 32, 32), "activation": "sigmoid"},
        {"batch_size": 10},
        {"batch_size": 1000},
        {"learning_rate": 1e-4},
        {"learning_rate": 1e-2},
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    models: tuple[Literal["logistic", "mlp"], ...] = ("logistic", "mlp")
    """Networks whose rows are run."""
    seeds: int = 10
    """Networks a row, with seeds from 1234 on."""
    epochs: int = 10
    """Passes over the training images."""
    dataset: str = "mnist"
    """The images: mnist, fashion_mnist, kmnist, digits, or auto: mnist where it can be had,
    otherwise digits."""


def flags(model: str, change: dict[str, Any], dataset: str, epochs: int, seeds: int) -> str:
    """The command of a row."""
    words = [f"--model={model}", f"--dataset={dataset}", f"--epochs={epochs}"]
    for name, value in change.items():
        if value is False:
            words.append(f"--no_{name}")
        elif isinstance(value, tuple):
            words.append(f"--{name} {' '.join(map(str, value))}")
        else:
            words.append(f"--{name}={value}")
    return f"python train.py {' '.join(words)} --seeds={seeds}"


def measure(options: Options) -> None:
    """Trains every row, prints the table and writes the file as it goes."""
    data = options.prepare()
    context = environment.describe(jax.devices()[0])
    recorder = Recorder(options.output, context | {"dataset": data["dataset"]})
    for model in options.models:
        for change in ABLATIONS[model]:
            launch.say(f"{model} {change or 'as the tutorial'}")
            numbers = {"epochs": options.epochs, "seeds": options.seeds}
            with tempfile.TemporaryDirectory() as folder:
                where = {"workdir": Path(folder) / "run", **data}
                record = fit(Config(model=model, **numbers, **where, **change)).record
            recorder.row(
                "ablations",
                model=model,
                change=change,
                command=flags(model, change, data["dataset"], **numbers),
                test_accuracy=record["test_accuracy"],
                statistics=record["statistics"]["test_accuracy"],
                train_s=record["timings"]["train_s"],
            )
            recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table | str]:
    """The table."""
    table = Table(title="test accuracy after the last epoch, %", box=box.SIMPLE)
    for heading in ("command", "mean", "sd", "difference", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    first: dict[str, Any] = {}
    for row in found.tables["ablations"]:
        base = first.setdefault(row["model"], row)
        said = row["statistics"]
        sd = "-" if said["sd"] is None else f"{100 * said['sd']:.2f}"
        cells = [row["command"], f"{100 * said['mean']:.2f}", sd]
        if row is not base and said["n"] > 1:
            test = welch(*(np.array(side["test_accuracy"]) for side in (base, row)))
            low, high = (100 * end for end in test["ci95"])
            cells += [f"{100 * test['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        table.add_row(*cells)
    return [table]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.ablations", __doc__ or ""))
