"""A run's folder: what was asked, where it ran, what came out. Plain JSON, whole or absent."""

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mnist_jax import atomic_io as storage
from mnist_jax.atomic_io import IntegrityError, write_atomically
from mnist_jax.config import Config
from mnist_jax.errors import CheckpointError, DeviceError, UsageError
from mnist_jax.metrics import mean_over_members
from mnist_jax.parallel.team import Team
from mnist_jax.runs.checkpoint import CheckpointManager, names_of

RECORDS = ("config.json", "environment.json", "metrics.jsonl")
RESULT = "result.json"
REPORT = "report.html"
PID = ".pid"  # the number of the process that holds the folder
TOKEN = ".token"  # by which other processes know the folder; of no use later
MANIFEST = "manifest.sha256"  # of the records and the result, as `sha256sum --check` reads it


class Run:
    """The folder of one run, which one process at a time may hold. Close it in the end.

    Args:
        folder: created if absent.
        config: what the run is; must be that of an earlier run in this folder, if there was one.

    Attributes:
        result: the content of result.json if the run is complete, else None.
        began: whether the folder held the run already.

    Raises:
        UsageError: the folder is in use, or holds another run, a part of one or something else.
        DeviceError: the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder = folder
        self.result: dict[str, Any] | None = None
        self.began = False
        self._tensorboard: Any = None
        self.checkpoints = CheckpointManager(folder / "checkpoints")
        self._lock = FileLock(folder / ".lock", timeout=0)
        try:
            storage.make_folder(folder, parents=True, exist_ok=True)
            # Hidden are the lock, and what a killed process was writing.
            names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
            if names and "config.json" not in names:
                raise UsageError(
                    f"{folder} is not empty and holds no run; choose another --workdir"
                )
            self._lock.acquire()
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            # The lock truncates its own file. Whatever is there is replaced, and never opened.
            write_atomically(folder / PID, str(os.getpid()).encode())
            self._open(config)
        except Timeout as error:
            raise _in_use(folder) from error
        except OSError as error:
            self.close()
            raise _unwritable(folder, error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes have the folder."""
        self.checkpoints.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._lock.release()

    def _open(self, config: Config) -> None:
        folder = self.folder
        self.began = (folder / "config.json").exists()
        if self.began:
            try:
                before = storage.read_json(folder / "config.json")
            except IntegrityError as error:
                raise UsageError(
                    f"{folder} holds no readable run ({error}); choose another --workdir"
                ) from error
            self._check_same(before, config)
            self.result = read_result(folder)
            if self.result is not None:
                return
        self._write_json("config.json", config.to_json())
        if config.tensorboard:
            self._tensorboard = summary_writer()(str(folder / "tensorboard"), write_to_disk=True)

    def _check_same(self, before: dict[str, Any], config: Config) -> None:
        now, usual = config.hyperparameters(), config.defaults().hyperparameters()
        different = [
            f"{name} (was {was!r}, now {value!r})"
            for name, value in now.items()
            # A run may be older than a field.
            if (was := before.get(name, usual[name])) != value
        ]
        if different:
            raise UsageError(
                f"{self.folder} holds another run; it differs in {', '.join(different)}; "
                "choose another --workdir"
            )

    def write_environment(self, record: dict[str, Any]) -> None:
        """Writes environment.json."""
        self._write_json("environment.json", record)

    def write_token(self, token: str) -> None:
        """Marks the folder, so that other processes can tell whether it is the one they see."""
        with self._writing():
            write_atomically(self.folder / TOKEN, token.encode())

    def restore(self, template: Any) -> tuple[Any, dict[str, Any], list[str]] | None:
        """What `CheckpointManager.load` finds, to go on from; None for a run that has not begun.

        Raises:
            CheckpointError: none of the run's checkpoints can be used, or they are gone.
            DeviceError: their folder cannot be read or cleaned up.
        """
        with self._writing():
            self.checkpoints.clean_up()
            found = self.checkpoints.load(template)
        metrics = self.folder / "metrics.jsonl"
        if found is None and metrics.exists() and metrics.stat().st_size:
            raise CheckpointError(
                f"{self.folder} holds a run without its checkpoints; restore them, or remove "
                f"{metrics} to start again"
            )
        return found

    def save(self, epoch: int, step: int, arrays: Any, rest: dict[str, Any]) -> None:
        """Saves a checkpoint while the caller goes on; see `CheckpointManager.save`."""
        with self._writing():
            self.checkpoints.save(epoch, step, arrays, rest)

    def is_saving(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self.checkpoints.busy

    def finish_saving(self) -> None:
        """Returns once the last checkpoint is on the disk."""
        with self._writing():
            self.checkpoints.wait()

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Makes metrics.jsonl hold these lines, one an epoch."""
        with self._writing():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.folder / "metrics.jsonl", lines.encode())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one epoch's line to metrics.jsonl."""
        with self._writing():
            self.checkpoints.wait_for_one()  # a crash must not leave lines and no checkpoint
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if self._tensorboard is not None:
                for name in row:
                    if math.isfinite(value := mean_over_members(row, name)):
                        self._tensorboard.add_scalar(name, value, row["step"])
                self._tensorboard.flush()

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Shows (height, width, 3) uint8 in TensorBoard, where that was asked for."""
        with self._writing():
            if self._tensorboard is not None:
                self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
                self._tensorboard.flush()

    def finish(self, record: dict[str, Any]) -> None:
        """Writes result.json, which marks the run as complete, and before it all files' digests."""
        result = _json_bytes(record)
        with self._writing():
            contents = {name: (self.folder / name).read_bytes() for name in RECORDS}
            digests = storage.digest_lines({**contents, RESULT: result})
            write_atomically(self.folder / MANIFEST, digests)
            write_atomically(self.folder / RESULT, result)
        self.result = record

    def _write_json(self, name: str, value: Any) -> None:
        with self._writing():
            write_atomically(self.folder / name, _json_bytes(value))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.folder, error) from error


class Unwritten(Run):
    """A run's folder for the processes that do not write it: of what `Run` does, nothing is done.

    Args:
        folder: process 0's.
        result: that of process 0's `Run`.
    """

    def __init__(self, folder: Path, result: dict[str, Any] | None):
        self.folder, self.result = folder, result

    def _nothing(self, *_: Any, **__: Any) -> None:
        """In place of each method of `Run`."""

    close = write_environment = restore = save = finish_saving = _nothing
    write_metrics = append_metrics = add_image = finish = _nothing

    def is_saving(self) -> bool:
        """Never."""
        return False


def open_run(config: Config, team: Team) -> tuple[Run, list[str]]:
    """The run's folder: in process 0, which writes it, a `Run`, and elsewhere an `Unwritten`.

    Returns:
        It, and notices. The folder need not be seen by the machines of other processes: what
        process 0 reads there it tells them.

    Raises:
        UsageError: as `Run`; or another process's machine holds a run in that folder and that of
            process 0 holds none, so that it would begin again.
        DeviceError: as `Run`.
    """
    if team.count == 1:
        return Run(config.workdir or default_folder(config), config), []
    run = Run(config.workdir or default_folder(config), config) if team.leads else None
    token = uuid.uuid4().hex
    if run is not None:
        run.write_token(token)
    folder, token, began = team.decide(run and (str(run.folder.resolve()), token, run.began))
    _, result = team.broadcast({}, run and run.result)
    try:
        sees = (Path(folder) / TOKEN).read_text() == token
    except (OSError, ValueError):
        sees = False
    other = config.workdir is not None and not sees and (config.workdir / "config.json").exists()
    everyones = team.gather((sees, other))
    for index, (_, has_another) in enumerate(everyones):
        if has_another and not began:
            if run is not None:
                run.close()
            raise UsageError(
                f"the machine of process {index} holds a run in {config.workdir} and that of "
                "process 0 does not; name a folder that they share, or start process 0 there"
            )
    notices = []
    if not all(sees for sees, _ in everyones):
        notices.append(
            f"only the machine of process 0 has the folder {folder}; an interrupted run goes on "
            "where process 0 is started there again"
        )
    return run or Unwritten(Path(folder), result), notices


def _holder(folder: Path) -> str:
    """The number of the process that holds a folder."""
    for _ in range(20):
        try:
            pid = int(storage.read_bounded(folder / PID, max_bytes=20))
            os.kill(pid, 0)
            return str(pid)
        except (OSError, ValueError, OverflowError):  # not written yet, or an earlier holder's
            time.sleep(0.05)
    return "unknown"


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def check_idle(folder: Path) -> None:
    """Refuses a folder whose run goes on, for its files change while they are read.

    Raises:
        UsageError: names the process.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    if storage.exists(folder / ".lock"):
        try:
            with lock:
                pass
        except Timeout as error:
            raise _in_use(folder) from error
        except OSError:  # it cannot be written, so no run can go on in it
            pass


def _in_use(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is in use by process {_holder(folder)}; wait for it or choose another --workdir"
    )


def read_result(folder: Path) -> dict[str, Any] | None:
    """What result.json says; None where there is none, as in a run that is not complete.

    Raises:
        CheckpointError: it is not what the run wrote.
    """
    path = folder / RESULT
    try:
        data = storage.read_bounded(path, max_bytes=storage.MAX_JSON_BYTES)
        storage.check_digest(path, data, folder / MANIFEST)
        return storage.parse_json(data, RESULT)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read the result of {folder}: {error}; see who may read its files"
        ) from error
    except (OSError, IntegrityError) as error:
        raise CheckpointError(
            f"the result is damaged: {error}; remove {path}, and the run's own command with "
            f"--workdir={folder} writes it again"
        ) from error


def summary_writer() -> Any:
    """The class that writes TensorBoard's files.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs tensorboardX; pip install '.[tensorboard]' or leave it out"
        ) from error
    return SummaryWriter


def _unwritable(folder: Path, error: OSError) -> DeviceError:
    full = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return DeviceError(
        f"cannot write the run's folder {folder} ({error.strerror}); {full}choose another --workdir"
    )


def default_folder(config: Config) -> Path:
    """Makes runs/<dataset>-<model>-<UTC time>, with a number behind it if that exists already.

    Raises:
        DeviceError: it cannot be made.
    """
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    first = Path("runs") / f"{config.dataset}-{config.model}-{now}"
    folder, number = first, 1
    while True:
        try:
            storage.make_folder(folder, parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise _unwritable(folder, error) from error


def params_sha256(params: Any) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    named = names_of(params)
    for name in sorted(named):
        array = np.asarray(named[name], order="C")
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(little_endian.tobytes())
    return digest.hexdigest()
