"""`--tensorboard`: the metrics and two figures of a run, written for TensorBoard."""

import math
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.inference.compare import predict_all
from mnist_jax.inference.restore import load_run
from mnist_jax.metrics import mean_over_members
from mnist_jax.reporting import plots, report

SAMPLES = 60  # training images shown


class TensorBoard(Callback):
    """Writes into the run's folder `tensorboard`; a resumed run appends."""

    _writer: Any = None  # None: the run has not begun, or was complete before

    def on_train_begin(  # noqa: D102
        self, config: Config, dataset: Dataset, model: Any, devices: Any, workdir: Path, step: int
    ) -> None:
        # TensorBoard drops what a stopped run wrote after the checkpoint that this one resumes.
        purge_step = step + 1 if step else None
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)
        self._dataset = dataset
        if step == 0:
            names = [dataset.class_names[i] for i in dataset.train.label[:SAMPLES]]
            figure = plots.samples(dataset.train.image[:SAMPLES], names)
            self._writer.add_figure("train", figure, 0)

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Writes each number of the row; of an ensemble the mean of its finite members."""
        for name in row:
            if math.isfinite(value := mean_over_members(row, name)):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def on_train_end(self, result: Result) -> None:
        """Adds the confusion matrix of the test images."""
        if self._writer is not None:
            run = load_run(result.workdir)
            prediction = predict_all([run], self._dataset)
            figure = report.confusion_figures(self._dataset, prediction)[0].figure
            self._writer.add_figure("confusion", figure, run.step)

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
