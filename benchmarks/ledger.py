"""Where the wall time of a real run goes, from the start of its process to its end.

    python -m benchmarks.ledger --model mlp --output FILE

`train.py` is run in a process of its own, with clocks around its parts. At any moment one part has
the clock: one that begins inside another takes it over, so that no second counts twice. The sum is
held against the time that this process saw. `start` and `end` are what Python takes around all of
it; `unaccounted` is what no part has: training's own loop between its calls, and all that is small.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich import box
from rich.table import Table

from benchmarks import launch, roofline, step
from benchmarks.results import Recorder, Results
from mnist_jax.models import MODELS
from mnist_jax.parallel import mesh as devices

UNACCOUNTED = "unaccounted"
CLOSES = 0.02  # of the wall time may be unaccounted for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    model: tuple[launch.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks to train."""
    batch_size: int = 100
    """Images a training step."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Precision of products."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Device to run on; auto: the best that JAX finds."""
    epochs: int = 3
    """Passes over the training images."""
    max_steps: int | None = None
    """End the run after this many steps. None: after --epochs."""
    repeats: int = 3
    """Samples of each of the device's rates, beside which a step is set."""


def account(words: list[str]) -> tuple[dict[str, float], float]:
    """Runs `train.py` with these words.

    Returns:
        The seconds of each part, and those of the process from its start to its end.
    """
    question = {"started": time.monotonic(), "words": words}
    worker = ["-m", "benchmarks.peer_workers.accounts", json.dumps(question)]
    done = launch.run(Path(sys.executable), worker, variables={})
    seconds = json.loads(done.output.splitlines()[-1])["seconds"]
    ended = done.wall_s - sum(seconds.values())
    return seconds | {"end": max(0.0, ended)}, done.wall_s


def measure(options: Options) -> None:
    """Runs every network, prints the ledgers and writes the file."""
    context = launch.where(options.platform)
    data = options.prepare()
    recorder = Recorder(options.output, context | {"dataset": data["dataset"]})
    # Before this process takes the device.
    runs = []
    for model in options.model:
        with step.left_out_if_impossible(recorder, model):
            runs.append(run(options, model, data))
    device = devices.select_device(options.platform)
    with jax.default_device(device):
        dtype = devices.compute_dtype(options.precision, device)
        with jax.default_matmul_precision(devices.MATMUL_PRECISION[options.precision]):
            size = roofline.matrix_size(device)
            product = roofline.matrix_rate(options.repeats, size, dtype)
            copy = roofline.copy_rate(options.repeats)
    flops_per_s = 2 * size**3 / np.median(product.samples_s)
    bytes_per_s = 2 * roofline.COPY_BYTES / np.median(copy.samples_s)
    for row in runs:
        model = MODELS[row["model"]](dtype=dtype)
        work = roofline.train_work(model, options.batch_size, device.platform)
        recorder.row("ledger", **row, limit_s=work.limit_s(flops_per_s, bytes_per_s))
    recorder.write()
    launch.show(report(recorder.found))


def run(options: Options, model: str, data: dict[str, Any]) -> dict[str, Any]:
    """Trains a network; returns its row, but for the limit."""
    words = [f"--model={model}", *(f"--{name}={value}" for name, value in data.items())]
    for field in ("batch_size", "precision", "platform", "epochs", "max_steps"):
        if (value := getattr(options, field)) is not None:
            words.append(f"--{field}={value}")
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        # Compiled programs of earlier runs are not at hand: a ledger tells of a first start.
        places = [f"--workdir={workdir}", f"--compilation_cache={folder}/compiled"]
        seconds, wall_s = account([*words, *places])
        result = json.loads((workdir / "result.json").read_text())
    return {
        "model": model,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "words": words,
        "seconds": seconds,
        "wall_s": wall_s,
        "step_s": result["timings"]["train_s"] / result["steps"],
    }


def closes(row: dict[str, Any]) -> bool:
    """Whether all but 2 % of the wall time is accounted for, and none of it twice."""
    known = sum(s for part, s in row["seconds"].items() if part != UNACCOUNTED)
    return abs(row["wall_s"] - known) <= CLOSES * row["wall_s"]


def sentence(row: dict[str, Any]) -> str:
    """What the ledger says in a line."""
    seconds, wall_s = row["seconds"], row["wall_s"]
    part = max(seconds, key=seconds.__getitem__)
    share, idle = seconds[part] / wall_s, 1 - row["limit_s"] / row["step_s"]
    kind = "not arithmetic or memory traffic at the device's own rates"
    return (
        f"{row['model']}: {part} is {share:.0%} of {wall_s:.3g} s; of a training step of "
        f"{1e3 * row['step_s']:.3g} ms, {max(0.0, idle):.0%} is {kind}"
    )


def report(found: Results) -> list[Table | str]:
    """The ledgers, each with what it says, and what was left out."""
    ledgers = [part for row in found.tables.get("ledger", []) for part in _of_one(row)]
    return [*ledgers, *step.left_out(found)]


def _of_one(row: dict[str, Any]) -> list[Table | str]:
    table = Table(title=f"{row['model']}: {' '.join(row['words'][:2])}", box=box.SIMPLE)
    table.add_column("part", no_wrap=True)
    for heading in ("s", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, s in sorted(row["seconds"].items(), key=lambda item: -item[1]):
        table.add_row(part, f"{s:.3f}", f"{s / row['wall_s']:.1%}")
    table.add_row("wall", f"{row['wall_s']:.3f}", "100.0%")
    verdict = "closes" if closes(row) else "does NOT close"
    return [table, f"the ledger {verdict} within {CLOSES:.0%}", sentence(row)]


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.ledger", __doc__ or ""))
