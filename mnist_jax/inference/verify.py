"""Whether a run's folder still holds what the run left, and whether its accuracy is true."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data import load_dataset
from mnist_jax.errors import CheckpointError
from mnist_jax.inference import restore as saved
from mnist_jax.metrics import Metrics
from mnist_jax.models import count_parameters, param_shapes
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import checkpoint, environment
from mnist_jax.runs import run_dir as runs
from mnist_jax.runs.results import outcome

ELSEWHERE = 0.001  # share of images that rounding may turn on a GPU, or elsewhere


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: what.
        found: what was found there, or what is wrong.
        good: whether it is as it should be.
    """

    name: str
    found: str
    good: bool


class _WrongError(Exception):
    """What a check found wrong."""


def verify(
    folder: Path,
    *,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    platform: str | None = None,
) -> Iterator[Check]:
    """Looks at all that a run left, file by file, and at last evaluates its model again.

    Changes nothing; the run must not go on meanwhile (`runs.check_idle`). One that is not complete
    is checked as far as it has come.

    Args:
        folder: the run's.
        data_dir: where its data set is; None for where the run had it.
        manual_dir: where the data set's original files are, if it is not in `data_dir`.
        platform: the device that evaluates; None for the run's own.

    Raises:
        UsageError: the folder holds no run.
        DeviceError: the platform is absent.
        DataError: the run's data set cannot be had, so the accuracy cannot be computed again.
    """
    config = saved.load_config(folder)  # without it nothing else makes sense
    seeds = config.all_seeds()
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    yield Check("config", f"{config.model} on {config.dataset}, {which}", True)
    yield _check("files", lambda: _files(folder))
    yield (checkpoints := _check("checkpoints", lambda: _checkpoints(folder)))
    if not checkpoints.good:
        return
    run = saved.load_run(folder)
    try:
        record = runs.read_result(folder)
    except CheckpointError:  # said under "files"
        return
    yield _check("metrics", lambda: _metrics(run, complete=record is not None))
    if record is None:
        step = run.progress.step
        yield Check("result", f"none yet: the run stands at step {step:,}", True)
        return
    yield _check("result", lambda: _result(run, record))
    data_dir = data_dir or config.data_dir
    dataset = load_dataset(config.dataset, data_dir=data_dir, manual_dir=manual_dir)
    with devices.running_on(platform or config.platform, config.precision) as device:
        sums = saved.evaluate(run, dataset.test, device)
        exact = environment.describe(device) == record.get("environment")
        exact = exact and device.platform != "gpu"  # whose bits differ from process to process
    yield _check("accuracy", lambda: _accuracy(record, sums, exact))


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, look(), True)
    except (_WrongError, CheckpointError, storage.IntegrityError, OSError) as error:
        return Check(name, str(error), False)


def _files(folder: Path) -> str:
    """Whether the files of a complete run have the digests of its manifest."""
    if runs.read_result(folder) is None:
        storage.read_json(folder / "environment.json")
        return "no manifest yet"
    for name in runs.RECORDS:
        path = folder / name
        data = storage.read_bounded(path, max_bytes=storage.MAX_JSON_BYTES)
        storage.check_digest(path, data, folder / runs.MANIFEST)
    return f"{', '.join((*runs.RECORDS, runs.RESULT))} are what the run wrote"


def _checkpoints(folder: Path) -> str:
    """Whether every checkpoint proves whole."""
    progress = saved.load_run(folder).progress
    for path in sorted((folder / "checkpoints").glob("*.safetensors")):
        storage.read_verified(path, max_bytes=checkpoint.max_bytes(progress.split()[0]))
    return f"whole; the newest has {progress.epoch} epochs and {progress.step:,} steps"


def _metrics(run: saved.LoadedRun, *, complete: bool) -> str:
    """Whether metrics.jsonl has the lines of the newest checkpoint, and only finite numbers."""
    path = run.folder / "metrics.jsonl"
    data = storage.read_bounded(path, max_bytes=storage.MAX_JSON_BYTES)
    known, lines = run.progress.rows, data.splitlines()
    rows = [storage.parse_json(line, path.name) for line in lines[: len(known)]]
    # A run that was killed may have written more since its newest checkpoint.
    if rows != known or (complete and len(lines) > len(known)):
        raise _WrongError(f"{path.name} does not hold the epochs of the newest checkpoint")
    for row in known:
        for name, value in row.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None and not math.isfinite(one):  # None: of a member that was lost
                    raise _WrongError(f"{name} of epoch {row['epoch']} is {one}")
    return f"{len(known)} epochs"


def _result(run: saved.LoadedRun, record: dict[str, Any]) -> str:
    """Whether result.json says of the run what its other files say."""
    progress = run.progress
    if not progress.rows:
        raise _WrongError("the newest checkpoint has no epoch, so the run was not complete")
    expected = {
        # As it was written: by another version, perhaps, which had other fields.
        "config": storage.read_json(run.folder / "config.json"),
        "seed": run.config.seed,
        "epochs": progress.epoch,
        "steps": progress.step,
        "parameters": count_parameters(param_shapes(run.model)),
        **outcome(run.config, progress),
    }
    for name, value in expected.items():
        was = record.get(name)
        if was != value and isinstance(was, dict) and isinstance(value, dict):
            keys = sorted(
                key for key in was.keys() | value.keys() if was.get(key) != value.get(key)
            )
            raise _WrongError(f"{name} differs from the other files in {', '.join(keys)}")
        if was != value:
            raise _WrongError(f"{name} is {was!r}, by the other files {value!r}")
    return "the parameters and the numbers are the newest checkpoint's"


def _accuracy(record: dict[str, Any], sums: Metrics, exact: bool) -> str:
    """Whether the test accuracy comes out again: of every member, where there are several."""
    correct, count = np.ravel(sums.correct).tolist(), int(np.max(sums.count))
    recorded = record.get("test_correct")
    recorded = recorded if isinstance(recorded, list) else [recorded]
    found = f"{', '.join(map(str, correct))} of {count} test images"
    if (recorded, record.get("test_count")) == (correct, count):
        return f"{found}, as recorded"
    found = f"{found}; recorded were {', '.join(map(str, recorded))}"
    near = len(recorded) == len(correct) and all(
        isinstance(was, int) and abs(is_now - was) <= ELSEWHERE * count
        for is_now, was in zip(correct, recorded, strict=True)
    )
    if exact or not near or record.get("test_count") != count:
        raise _WrongError(found)
    return f"{found}: rounding on a GPU, another device or with other versions"
