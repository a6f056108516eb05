"""`--tensorboard`: the metrics of a run, written for TensorBoard."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.summary import scalar

from mnist_jax.callbacks import Callback
from mnist_jax.config import Config, group_by_point, member_label
from mnist_jax.data import Dataset
from mnist_jax.errors import writing
from mnist_jax.metrics import member_means, select_members

WRITING = partial(writing, "the TensorBoard logs", "--workdir")


class TensorBoard(Callback):
    """Writes into the run's folder `tensorboard`; a resumed run appends."""

    _writer: Any = None  # None: the run has not begun, or was complete before

    def on_train_begin(  # noqa: D102
        self, config: Config, dataset: Dataset, model: Any, devices: Any, workdir: Path, step: int
    ) -> None:
        self._config, folder = config, workdir / "tensorboard"
        with WRITING():
            folder.mkdir(parents=True, exist_ok=True)
            # No SummaryWriter: its thread dies of a full disk, and then the run hangs.
            self._writer = EventsWriter(f"{folder}/events", f".{step}")
            # TensorBoard drops what a stopped run wrote after the checkpoint that is resumed.
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Writes each number of the row; for seeds the mean of the finite ones, for a grid each."""
        values: dict[str, float] = {}
        for label, indices in group_by_point(self._config.members()).items():
            for name, mean in member_means(select_members(row, indices)).items():
                values[f"{name}/{label}" if label and "/" in name else name] = mean
        with WRITING():
            for tag in filter(lambda tag: math.isfinite(values[tag]), values):
                self._write(row["step"], summary=scalar(tag, values[tag]))
            self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            with WRITING():
                self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))


class TensorBoardSteps(TensorBoard):
    """Also writes the loss and the gradient norm of every step, of each member."""

    @WRITING()
    def on_steps(self, first: int, values: dict[str, np.ndarray]) -> None:  # noqa: D102
        names = [f"/{member_label(member)}" for member in self._config.members()]
        for tag, array in values.items():
            for name, row in zip(names, np.atleast_2d(array), strict=True):
                tag_of_member = f"step/{tag}{name if len(names) > 1 else ''}"
                for step, value in enumerate(row.tolist(), first + 1):
                    self._write(step, summary=scalar(tag_of_member, value))
