"""Checks that a run's folder holds what the run wrote and that its accuracy is reproducible."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import atomic_io
from mnist_jax.errors import CheckpointError
from mnist_jax.inference.flags import DataFlags, RunFolder
from mnist_jax.inference.restore import dataset_of, evaluate_split, load_config, load_run
from mnist_jax.metrics import Metrics
from mnist_jax.parallel import mesh
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs import checkpoint, environment, run_dir
from mnist_jax.runs.results import params_sha256

TOLERANCE = 0.001  # share of images that rounding may change on a GPU or in another environment


class Check(NamedTuple):
    """One check: its name, what was found, and whether that is right."""

    name: str
    found: str
    good: bool


def verify(
    folder: Path,
    *,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    platform: str | None = None,
) -> Iterator[Check]:
    """Checks a run's files against their digests, then evaluates its model again.

    Changes nothing. Of an incomplete run, checks only the checkpoints.

    Raises:
        UsageError: the folder holds no run.
        DataError, DeviceError: the data set cannot be loaded, or the platform is absent.
    """
    config = load_config(folder)
    yield (files := _check("files", lambda: _files(folder)))
    yield (checkpoints := _check("checkpoints", lambda: _checkpoints(folder)))
    if not (files.good and checkpoints.good) or (record := run_dir.read_result(folder)) is None:
        return
    yield _check("parameters", lambda: _parameters(folder, record))
    run = load_run(folder)
    dataset = dataset_of(run, data_dir=data_dir, manual_dir=manual_dir)
    with mesh.use_device(platform or config.platform, config.precision) as device:
        metrics = evaluate_split(run, dataset.test, device)
        exact = environment.describe(device) == record["environment"] and device.platform != "gpu"
    yield _check("accuracy", lambda: _accuracy(record, metrics, exact))


def _check(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, find(), True)
    except (CheckpointError, atomic_io.IntegrityError, OSError) as error:
        return Check(name, str(error), False)


def _files(folder: Path) -> str:
    if run_dir.read_result(folder) is None:  # checks the digest of result.json
        return "the run is incomplete and has no manifest yet"
    for path in (folder / run_dir.CONFIG, folder / run_dir.ENVIRONMENT, folder / run_dir.METRICS):
        atomic_io.check_digest(path, path.read_bytes(), folder / run_dir.MANIFEST)
    return f"all match {run_dir.MANIFEST}"


def _checkpoints(folder: Path) -> str:
    paths = sorted((folder / "checkpoints").glob("*.safetensors"))
    for path in paths:
        atomic_io.read_verified(path)
    return f"{len(paths)} match their digests; the newest is at step {load_run(folder).step:,}"


def _parameters(folder: Path, record: dict[str, Any]) -> str:
    arrays, _, _ = checkpoint.load_newest(folder / "checkpoints") or ({}, {}, [])
    named = {name.partition("state/params/")[2]: array for name, array in arrays.items()}
    params = {name: array for name, array in named.items() if name}
    seeds = record.get("seeds")
    members = [member_of(params, m) for m in range(seeds)] if seeds else [params]
    if [params_sha256(member) for member in members] != np.ravel(record["params_sha256"]).tolist():
        raise CheckpointError(f"the newest checkpoint's are not those of {run_dir.RESULT}")
    return "the newest checkpoint's have the recorded SHA-256"


def _accuracy(record: dict[str, Any], metrics: Metrics, exact: bool) -> str:
    correct, recorded = np.atleast_1d(metrics.correct), np.atleast_1d(record["test_correct"])
    found = f"{', '.join(map(str, correct))} of {record['test_count']} test images"
    if (correct == recorded).all():
        return f"{found}, as recorded"
    found += f"; recorded: {', '.join(map(str, recorded))}"
    if exact or np.abs(correct - recorded).max() > TOLERANCE * record["test_count"]:
        raise CheckpointError(found)
    return f"{found}; rounding differs between devices and versions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(DataFlags):
    """Checks a run's files against their digests and recomputes its accuracy."""

    folder: RunFolder
    """The run's folder."""

    def run(self) -> None:
        """Prints a line per check; raises CheckpointError if one failed."""
        folder, failed = atomic_io.user_path(self.folder), []
        run_dir.check_idle(folder)
        for check in verify(folder, platform=self.platform, **self.folders_of_data()):
            print(f"{check.name:12s}{'ok' if check.good else 'WRONG':6s}{check.found}", flush=True)
            failed += [] if check.good else [check.name]
        if failed:
            problem = f"{folder} differs from what its run wrote: {', '.join(failed)}"
            raise CheckpointError(f"{problem}; remove result.json and repeat the run's command")
        print("OK")
