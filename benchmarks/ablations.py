"""What each part of the tutorial's recipe is worth: one changed at a time, many seeds each.

    python -m benchmarks.ablations --output FILE --manual_dir DIR

A row is one command, such as `python train.py --model=mlp --activation=sigmoid --seeds=10`; the
file holds every seed's accuracy on the test images after the last epoch. Nothing is chosen by it:
all rows are shown. The difference to the model's first row stands with Welch's 95 % interval.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import launch, results
from mnist_jax import environment
from mnist_jax.config import Config
from mnist_jax.data import DEFAULT_DATA_DIR, load_dataset
from mnist_jax.statistics import welch
from mnist_jax.storage import write_atomically
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
        {"batch_size": 10},
        {"batch_size": 1000},
        {"learning_rate": 1e-4},
        {"learning_rate": 1e-2},
    ],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags."""

    output: Path
    """The result file."""
    models: tuple[Literal["logistic", "mlp"], ...] = ("logistic", "mlp")
    """Networks whose rows are run."""
    seeds: int = 10
    """Networks a row, with seeds from 1234 on."""
    epochs: int = 10
    """Passes over the training images."""
    dataset: str = "mnist"
    """The data set."""
    data_dir: Path = DEFAULT_DATA_DIR
    """Where it is prepared and cached."""
    manual_dir: Path | None = None
    """Folder with its four original .gz files."""

    def __post_init__(self):
        launch.check_options(self)


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
    """Trains every row, and after each prints the table and writes the file."""
    results.check_writable(options.output)
    where = {"data_dir": options.data_dir, "manual_dir": options.manual_dir}
    name = load_dataset(options.dataset, **where).name
    context = {**environment.describe(jax.devices()[0]), "dataset": name, "epochs": options.epochs}
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for change in ABLATIONS[model]:
            with tempfile.TemporaryDirectory() as folder:
                launch.say(f"{model} {change or 'as the tutorial'}")
                config = Config(
                    model=model,
                    dataset=name,
                    epochs=options.epochs,
                    seeds=options.seeds,
                    workdir=Path(folder) / "run",
                    **where,
                    **change,
                )
                record = fit(config).record
            accuracies = record["test_accuracy"]
            rows.append(
                {
                    "model": model,
                    "change": change,
                    "command": flags(model, change, name, options.epochs, options.seeds),
                    "test_accuracy": accuracies,
                    "statistics": record["statistics"]["test_accuracy"],
                    "train_s": record["timings"]["train_s"],
                }
            )
            content = {"version": results.VERSION, "context": context, "ablations": rows}
            write_atomically(options.output, (json.dumps(content, indent=1) + "\n").encode())
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="test accuracy after the last epoch, %")
    for heading in ("command", "mean", "sd", "difference", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    first: dict[str, Any] = {}
    for row in rows:
        base = first.setdefault(row["model"], row)
        found = row["statistics"]
        sd = "-" if found["sd"] is None else f"{100 * found['sd']:.2f}"
        cells = [row["command"], f"{100 * found['mean']:.2f}", sd]
        if row is not base and found["n"] > 1:
            test = welch(*(np.array(side["test_accuracy"]) for side in (base, row)))
            low, high = (100 * end for end in test["ci95"])
            cells += [f"{100 * test['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.ablations", __doc__ or ""))
