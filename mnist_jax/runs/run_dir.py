"""The folder of a run: its config, metrics, result and checkpoints, and the lock that guards it."""

import contextlib
import datetime
import glob
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout

from mnist_jax import atomic_io
from mnist_jax.atomic_io import IntegrityError, user_path, write_atomically
from mnist_jax.config import FORMAT_VERSION, Config
from mnist_jax.data import DataSpec
from mnist_jax.errors import CheckpointError, UsageError, writing
from mnist_jax.metrics import Metrics
from mnist_jax.models import make_model
from mnist_jax.parallel.mesh import select_device
from mnist_jax.runs import checkpoint, environment
from mnist_jax.runs.checkpoint import CheckpointManager, Progress, flatten, load_saved, unflatten
from mnist_jax.runs.environment import PACKAGES
from mnist_jax.steps import TrainState

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
FORK = "fork.py"  # a copy of the fork's file, so that the folder can be read on its own
RESULT = "result.json"
REPORT = "report.html"
MANIFEST = "manifest.sha256"  # digests of the four JSON files and the fork, for `sha256sum --check`


class RunDir:
    """The folder of one run, held by one process at a time. Close it at the end.

    Args:
        folder: created if absent; may hold the same run, interrupted or complete.
        config: resolved.
        data: the data set's shape and classes.

    Attributes:
        result: the content of result.json if the run is complete, else None.
        checkpoints: saves the run's checkpoints.

    Raises:
        UsageError: the folder is in use, or holds another run or something else.
        CheckpointError: the folder's config or result is damaged.
        DeviceError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Config, data: DataSpec):
        self.folder = folder
        self.result: dict[str, Any] | None = None
        self.checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint_every)
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            names = self._open()
            if CONFIG in names:
                self._check_same(read_config(folder), config, data)
                self.result = read_result(folder)
            if self.result is None:
                if config.fork is not None:
                    self._write(FORK, config.fork.read_bytes())
                here = {"data_dir": str(config.data_dir.absolute()), "data": data._asdict()}
                self._write(CONFIG, _json({**config.to_json(), **here}))
        except BaseException:
            self.close()
            raise

    def _open(self) -> set[str]:
        """Makes and locks the folder, and tidies it up; returns the names of what is in it."""
        with self._writing():
            atomic_io.make_folder(self.folder, parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
            if names and CONFIG not in names:
                raise UsageError(f"{self.folder} is not empty and holds no run; choose another")
            try:
                self._lock.acquire()
            except Timeout as error:
                problem = f"{self.folder} is in use by another process"
                raise UsageError(f"{problem}; wait for it, or choose another") from error
            for place in (self.folder, self.checkpoints.folder):
                for leftover in place.glob(".*.tmp"):  # of a write that was interrupted
                    leftover.unlink()
        return names

    def close(self) -> None:
        """Waits for the last checkpoint and releases the folder."""
        self.checkpoints.close()
        self._lock.release()

    def _check_same(self, before: tuple[Config, DataSpec], config: Config, data: DataSpec) -> None:
        old, new = before[0].hyperparameters(), config.hyperparameters()
        if old["dataset"] == new["dataset"]:
            old["the data"], new["the data"] = list(before[1]), list(data)
        changed = [f"{n} (was {old.get(n)!r}, now {new[n]!r})" for n in new if old.get(n) != new[n]]
        if changed:
            what = f"{self.folder} holds another run; it differs in {', '.join(changed)}"
            folder = shlex.quote(str(self.folder))
            advice = f"choose another --workdir, perhaps with --init_from={folder}, or repeat"
            command = f"{before[0].command_line()} --workdir={folder}"
            raise UsageError(f"{what}; {advice} its command: {command}")

    def write_environment(self, record: dict[str, Any], allow_code_change: bool) -> list[str]:
        """Writes environment.json, with those of earlier starts; returns a warning of changes.

        Raises UsageError if the code has changed since the run began, and that is not allowed.
        """
        path, warnings = self.folder / ENVIRONMENT, []
        before = read_environment(self.folder) if path.exists() else record
        names = ["python", "cpu", "instruction_set", "device", "devices_used", "code_sha256"]
        changed = [n for n in (*PACKAGES, *names) if before.get(n) != record.get(n)]
        if "code_sha256" in changed and not allow_code_change:
            problem = f"the code of mnist_jax has changed since {self.folder} began"
            raise UsageError(f"{problem}; use the former code, or resume with --allow_code_change")
        if changed:
            facts = ", ".join(f"{n} (was {before.get(n)}, now {record.get(n)})" for n in changed)
            warnings.append(f"the run resumes in another environment: {facts}")
            earlier = before.pop("earlier", [])
            record = {**record, "earlier": [*earlier, before]}
        self._write(ENVIRONMENT, _json(record if changed else before))
        return warnings

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by these lines, one for each epoch."""
        if len(rows) == 1:  # a run with metrics and without any checkpoint could not be resumed
            self.checkpoints.wait_until_finished()
        self._write(METRICS, b"".join(_json(row, indent=None) for row in rows))

    def _write(self, name: str, data: bytes) -> None:
        with self._writing():
            write_atomically(self.folder / name, data)

    def restore(self, template: Any) -> tuple[Any, dict[str, Any], list[str]] | None:
        """The newest checkpoint: a tree like `template`, the metadata and warnings.

        None before the run's first checkpoint. Raises CheckpointError if none can be used.
        """
        metrics = self.folder / METRICS
        has_trained = metrics.exists() and metrics.stat().st_size > 0
        if not has_trained and not has_begun(self.folder):
            return None
        arrays, metadata, warnings = load_saved(self.folder)
        try:
            return unflatten(template, arrays), metadata, warnings
        except CheckpointError as error:  # of another optimizer, or of `save_run`
            advice = f"start a new run from it with --init_from={shlex.quote(str(self.folder))}"
            raise CheckpointError(f"{error}, so it cannot resume; {advice}") from error

    def finish(self, record: dict[str, Any]) -> None:
        """Writes the digests of all files, and then result.json, which marks the run complete."""
        result = _json(record)
        with self._writing():
            paths = [self.folder / name for name in (CONFIG, ENVIRONMENT, METRICS, FORK)]
            contents = {path.name: path.read_bytes() for path in paths if path.exists()}
            digests = atomic_io.digest_lines({**contents, RESULT: result})
            (self.folder / REPORT).unlink(missing_ok=True)  # of the run when it was incomplete
            write_atomically(self.folder / MANIFEST, digests)
            write_atomically(self.folder / RESULT, result)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(f"the run's folder {self.folder}", "--workdir")


def _json(value: Any, indent: int | None = 1) -> bytes:
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def read_config(folder: Path) -> tuple[Config, DataSpec]:
    """The resolved Config of the run in a folder, and its data set's shape and classes.

    Runs the fork of the run, if it has one.

    Raises:
        UsageError: the folder holds no run, or one of an older format version, or one that needs a
            name that no fork gives.
        CheckpointError: config.json is damaged.
    """
    path = folder / CONFIG
    try:
        values = {**json.loads(path.read_bytes())}  # a TypeError if it is no object
        if (version := values.get("version", 1)) != FORMAT_VERSION:
            raise UsageError(
                f"{folder} has format version {version!r} and this program reads {FORMAT_VERSION}; "
                "use the version of mnist_jax that made it, or train again"
            )
        if values.get("fork") is not None:
            values["fork"] = folder / FORK
        config = Config.from_json(values)
        name, shape, names, sha256 = (values["data"][key] for key in DataSpec._fields)
        return config, DataSpec(name, tuple(shape), tuple(names), sha256)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder} holds no run; name a folder that train.py made") from error
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = f"{path} is not the config of a run ({error})"
        raise CheckpointError(f"{problem}; restore it, or choose another folder") from error


def read_environment(folder: Path) -> dict[str, Any]:
    """The content of environment.json; raises CheckpointError."""
    path = folder / ENVIRONMENT
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot use {path} ({error}); restore it from a copy") from error


def has_result(folder: Path) -> bool:
    """Whether the folder holds the result of a complete run."""
    return os.path.exists(folder / RESULT)


def has_begun(folder: Path) -> bool:
    """Whether the folder holds a checkpoint of a run."""
    return bool(glob.glob("*.safetensors", root_dir=folder / "checkpoints"))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of result.json; None if the run is not complete.

    Raises CheckpointError if the file is damaged or cannot be read.
    """
    path = folder / RESULT
    try:
        return json.loads(atomic_io.read_verified(path, folder / MANIFEST))
    except FileNotFoundError:
        return None
    except (OSError, IntegrityError) as error:
        problem = f"the result {path} cannot be used ({error})"
        command = f"the training command with --workdir={folder}"
        raise CheckpointError(f"{problem}; remove it and repeat {command}") from error


def save_run(
    folder: str | Path,
    config: Config,
    data: DataSpec,
    params: Any,
    model_state: Any = None,
    *,
    step: int = 0,
) -> None:
    """Saves what a loop of your own trained, for `load_run`, `predict` and the other commands.

    Args:
        folder: a new one.
        config: names the model and its arguments.
        data: the `spec` of the data set.
        params, model_state: arrays, as from `models.init_variables`.
        step: updates done.

    Raises:
        UsageError: the folder is not empty.
        CheckpointError: the arrays are not those of the model.
        DeviceError: the folder cannot be written.
    """
    folder, step = user_path(folder), int(step)
    if os.path.exists(folder / CONFIG):
        raise UsageError(f"{folder} holds a run; choose another folder")
    own = {"dataset": data.name, "seeds": None, "ema_decay": 0.0, **dict.fromkeys(config.grid)}
    config = Config.from_json(config.resolve().to_json() | own)
    given = {"state": {"params": params, "model_state": model_state or {}}}
    arrays, model = flatten(jax.device_get(given)), make_model(**config.model_arguments(data))
    done: Any = np.int32(step)
    state = TrainState(done, *checkpoint.variables_of(arrays, config, model), (), None)
    where = environment.describe(select_device(config.platform))
    with contextlib.closing(RunDir(folder, config, data)) as run:
        run.write_environment(where, allow_code_change=True)
        run.checkpoints.save(Progress(state, Metrics.zeros(), batch=step))
        run.checkpoints.wait_until_finished()


def make_default_folder(dataset: str, model: str) -> Path:
    """Makes runs/<dataset>-<model>-<UTC time>, with a number behind it if that exists."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    first = folder = Path("runs") / f"{dataset}-{model}-{now}"
    with writing(f"the run's folder {folder}", "--workdir"):
        atomic_io.make_folder(folder.parent, exist_ok=True)
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                atomic_io.make_folder(folder)
                break
            folder = first.with_name(f"{first.name}-{number}")
    return folder
