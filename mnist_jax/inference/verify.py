"""Checks that a run's folder holds what the run wrote and that its accuracy is reproducible."""

import dataclasses
from pathlib import Path

import numpy as np

from mnist_jax import atomic_io
from mnist_jax.errors import CheckpointError, print_warnings
from mnist_jax.inference.flags import DataFlags, RunFolder
from mnist_jax.inference.restore import LoadedRun, Predictor, dataset_of, load_run
from mnist_jax.runs import run_dir

TOLERANCE = 0.001  # share of images whose answer rounding may change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(DataFlags):
    """Checks a run's files against their digests and recomputes its accuracy."""

    folder: RunFolder
    """The run's folder."""

    def run(self) -> None:
        """Prints a line per check; raises CheckpointError if one fails. Changes nothing."""
        folder = atomic_io.user_path(self.folder)
        run_dir.read_config(folder)
        try:
            print(f"files       {_files(folder)}", flush=True)
            paths = sorted((folder / "checkpoints").glob("*.safetensors"))
            for path in paths:
                atomic_io.read_verified(path)
            run = load_run(folder)
            intact = f"{len(paths)} match their digests"
            print(f"checkpoints {intact}; the newest is at step {run.step:,}", flush=True)
            print(f"accuracy    {self._accuracy(run)}")
        except (CheckpointError, atomic_io.IntegrityError, OSError) as error:
            advice = "" if isinstance(error, CheckpointError) else "; restore the run from a copy"
            problem = f"{folder} differs from what its run wrote: {error}{advice}"
            raise CheckpointError(problem) from error
        print("OK")

    def _accuracy(self, run: LoadedRun) -> str:
        if (record := run.record) is None:
            return "not recorded yet"
        if run.step != record["steps"]:
            gone = f"the checkpoint of step {record['steps']:,} is gone"
            raise atomic_io.IntegrityError(f"{gone}; the newest is of step {run.step:,}")
        test = dataset_of(run, data_dir=self.data_dir, manual_dir=self.manual_dir).test
        prediction = Predictor(run, self.platform)(test.image)
        print_warnings(prediction.warnings)  # of networks that diverged, in the run or only here
        correct = (prediction.log_probabilities.argmax(2) == test.label).sum(1)
        counts = zip(run.config.members(), np.atleast_1d(record["test_correct"]), strict=True)
        recorded = np.array([count for member, count in counts if member in prediction.members])
        found = f"{', '.join(map(str, correct))} of {record['test_count']} test images"
        if (correct == recorded).all():
            return f"{found}, as recorded"
        found += f", recorded: {', '.join(map(str, recorded))}"
        if np.abs(correct - recorded).max() > TOLERANCE * record["test_count"]:
            raise atomic_io.IntegrityError(found)
        then = record["environment"]
        where = f"jax {then['jax']} on {then['device']} ({then['instruction_set']})"
        return f"{found}; the run used {where}, which may round differently"


def _files(folder: Path) -> str:
    if run_dir.read_result(folder) is None:  # checks the digest of result.json
        return "no manifest: the run is not complete, or save_run saved it"
    for name in (run_dir.CONFIG, run_dir.ENVIRONMENT, run_dir.METRICS, run_dir.FORK):
        path = folder / name
        if name != run_dir.FORK or path.exists():
            atomic_io.read_verified(path, folder / run_dir.MANIFEST)
    return f"all match {run_dir.MANIFEST}"
