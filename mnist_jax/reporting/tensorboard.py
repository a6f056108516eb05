"""`--tensorboard`: the metrics and two figures of a run, written for TensorBoard."""

import math
from pathlib import Path
from typing import Any

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.errors import UsageError
from mnist_jax.inference.compare import predict_all
from mnist_jax.inference.restore import load_run
from mnist_jax.metrics import mean_over_members
from mnist_jax.reporting import plots, report

SAMPLES = 60  # training images shown


class TensorBoard(Callback):
    """Writes into the run's folder `tensorboard`; a resumed run appends.

    Raises:
        UsageError: tensorboardX is not installed.
    """

    def __init__(self):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs tensorboardX; pip install '.[tensorboard]' or leave it out"
            ) from error
        self._make_writer = SummaryWriter
        self._writer: Any = None

    def on_train_begin(  # noqa: D102
        self, config: Config, dataset: Dataset, model: Any, devices: Any, workdir: Path, step: int
    ) -> None:
        # TensorBoard drops what a stopped run wrote after the checkpoint that this one resumes.
        purge_step = step + 1 if step else None
        self._writer = self._make_writer(str(workdir / "tensorboard"), purge_step=purge_step)
        self._dataset = dataset
        if step == 0:
            names = [dataset.class_names[i] for i in dataset.train.label[:SAMPLES]]
            figure = plots.samples(dataset.train.image[:SAMPLES], names)
            self._writer.add_image("train", plots.pixels(figure), 0, dataformats="HWC")

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Writes each number of the row; of an ensemble the mean of its finite members."""
        for name in row:
            if math.isfinite(value := mean_over_members(row, name)):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def on_train_end(self, result: Result) -> None:
        """Adds the confusion matrix of the test images."""
        if self._writer is not None:  # None: the run was complete before
            run, dataset = load_run(result.workdir), self._dataset
            counts = report.confusion_counts(predict_all([run], dataset), dataset)
            figure = plots.confusion_matrix(counts, dataset.class_names)
            self._writer.add_image("confusion", plots.pixels(figure), run.step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
