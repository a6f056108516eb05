"""Times the start: each phase up to the first step, and a whole `train.py` beside Keras.

    python -m benchmarks.startup --output FILE --manual_dir DIR

Phases, each round in fresh processes, first with an empty cache of compiled programs and then
with what that left in it: import; data (decoded before); init, the initial weights, the first
order and moving the images, with their compilation; trace and compile of `train_steps`;
first_step; and rest, what Python takes to start and to end.

The job, from starting the process to its end: the logistic model for 10 epochs, evaluated after
each, with all else that `train.py` does, beside a script that does the same with Keras's `fit`
and reads the images from an uncompressed .npz.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import launch, peers
from benchmarks.results import Benchmark, Recorder
from mnist_jax.data import load_dataset

PHASES = ("import", "data", "init", "trace", "compile", "first_step", "rest")
JOB, JOB_MODEL, BATCH_SIZE = "job", "logistic", 100
KERAS_JOB = "benchmarks.peer_workers.keras_job"
COLD, WARM = "cold cache", "warm cache"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    output: Path = Path("startup.json")
    """Result file, in JSON."""
    rounds: int = 5
    """How often everything is run."""
    models: tuple[launch.Model, ...] = ("logistic", "mlp", "cnn")
    """Networks whose phases are measured."""
    dataset: str = "mnist"
    """The images: mnist, fashion_mnist, kmnist, digits, or auto: mnist where it can be had,
    otherwise digits."""
    epochs: int = 10
    """Passes over the training images in the whole `train.py`."""
    peers_python: Path = Path(sys.executable)
    """Python interpreter that Keras is installed for."""


def measure(options: Options) -> None:
    """Runs all rounds, prints the tables and writes the file, after every round."""
    recorder = Recorder(options.output, {})
    data = {name: str(value) for name, value in options.prepare().items()}
    dataset, ours = load_dataset(data["dataset"], data_dir=data["data_dir"]), Path(sys.executable)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = dataset.train, dataset.test
        arrays = (train.image, train.label, test.image, test.label)
        np.savez(folder / "data.npz", *arrays)
        for i in range(options.rounds):

            def add(
                name: str, who: str, mode: str, model: str, seconds: float, share: Any, i: int = i
            ) -> None:
                names = {"name": name, "framework": who, "mode": mode, "model": model}
                common = {"batch_size": BATCH_SIZE, "precision": peers.PRECISION}
                details = {"round": i, "others_share": share}
                recorder.add(Benchmark.of([seconds], details=details, **names, **common))

            for model in options.models:
                question = data | {"model": model, "cache": str(folder / f"{model}-{i}")}
                for mode in (COLD, WARM):
                    done = launch.ask(ours, "benchmarks.peer_workers.phases", question)
                    recorder.context |= done.output.pop("context")
                    seconds = done.output | {"rest": done.wall_s - sum(done.output.values())}
                    for phase in PHASES:
                        add(phase, "mnist_jax", mode, model, seconds[phase], done.others_share)

            common = [f"--epochs={options.epochs}", f"--batch_size={BATCH_SIZE}"]
            flags = [f"--{k}={v}" for k, v in data.items()] + [f"--model={JOB_MODEL}", *common]
            for mode in (COLD, WARM):
                places = [f"--workdir={folder}/{i}-{mode}", f"--compilation_cache={folder}/job-{i}"]
                done = launch.run(ours, ["train.py", *flags, *places])
                add(JOB, "mnist_jax", mode, JOB_MODEL, done.wall_s, done.others_share)
            if "keras" not in recorder.context["left_out"]:
                words = [str(folder / "data.npz"), str(options.epochs), str(BATCH_SIZE)]
                try:
                    done = launch.run(options.peers_python, ["-m", KERAS_JOB, *words])
                except launch.ProcessError as error:
                    recorder.leave_out("keras", str(error))
                else:
                    add(JOB, "keras", "fit", JOB_MODEL, done.wall_s, done.others_share)
            recorder.write()
    show(recorder.benchmarks)
    peers.show_doubts(recorder.found)


def show(benchmarks: Sequence[Benchmark]) -> None:
    """Prints the phases of each model, and the job's table for either state of the cache."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "cache", *PHASES, title="start: medians in seconds")
    for model in dict.fromkeys(b.model for b in benchmarks if b.name != JOB):
        for mode in (COLD, WARM):
            found = [b for b in benchmarks if (b.model, b.mode) == (model, mode)]
            medians = [np.median([b.median_s for b in found if b.name == p]) for p in PHASES]
            table.add_row(model, mode, *(f"{median:.3f}" for median in medians))
    Console().print(table)
    for mode in (COLD, WARM):
        peers.show([b for b in benchmarks if b.name == JOB], ours=("mnist_jax", mode))


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.startup", __doc__ or ""))
