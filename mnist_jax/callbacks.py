"""Hooks that `fit` calls during a run; it uses nothing that they return."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.metrics import Metrics
from mnist_jax.runs.results import accuracy_line


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What `fit` returns. With members, arrays have a leading axis of members."""

    params: Any  # NumPy arrays; their EMA if the run keeps one
    model_state: Any  # the model's other collections, such as {"batch_stats": …}; often empty
    record: dict[str, Any]  # the content of result.json
    workdir: Path  # the run's folder

    def __repr__(self) -> str:
        return f"<Result {accuracy_line(self.record)}, in {self.workdir}>".replace("\n", "; ")


class Callback:
    """Watches a run. Override what you need; every method does nothing by default.

    With several processes only process 0 calls them. An exception ends the run.
    """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)  # of another base class
        if wrong := [n for n in vars(cls) if n.startswith("on_") and not hasattr(Callback, n)]:
            raise TypeError(f"{cls.__name__}: Callback has no {', '.join(wrong)}")

    def on_fit_begin(self, config: Config) -> None:
        """`fit` starts; it loads the data next."""

    def on_warning(self, message: str) -> None:
        """The user must know something, such as a data set used in place of another."""

    def on_data_loaded(self, dataset: Dataset) -> None:
        """The data set is in host memory."""

    def on_train_begin(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        devices: Sequence[jax.Device],
        workdir: Path,
        step: int,
    ) -> None:
        """Compilation comes next. The run resumes after `step` updates, or starts at 0.

        `config` has every value filled in. `devices` are those of all processes.
        """

    def on_epoch_begin(self, epoch: int, batch: int, num_batches: int) -> None:
        """Epoch `epoch` (from 1) starts, or resumes after `batch` of its `num_batches`."""

    def on_steps(self, first: int, values: dict[str, np.ndarray]) -> None:
        """The steps of one call of the compiled train steps; comes before `on_chunk_end`.

        The values are computed only if a callback overrides this method.

        Args:
            first: updates done before the first of these steps.
            values: "loss" and "grad_norm", float32 (steps,), or (members, steps).
        """

    def on_chunk_end(
        self, epoch: int, batch: int, num_batches: int, metrics: Metrics, train_s: float
    ) -> None:
        """One call of the compiled train steps is done: `batch` of `num_batches` in this epoch.

        Args:
            epoch: from 1.
            metrics: of the epoch so far; NumPy arrays, with one value per member if there are any.
            train_s: seconds of training in this epoch so far, without compilation.
        """

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch is trained and evaluated; its checkpoint may still be in progress.

        Args:
            row: its line of metrics.jsonl, such as "epoch", "step" and "test/accuracy"; with
                members a list for each metric.
        """

    def on_train_end(self, result: Result) -> None:
        """The run is complete, now or since an earlier call of `fit`."""

    def close(self) -> None:
        """`fit` ends, also after an error."""


def warn(callbacks: Sequence[Callback], messages: Sequence[str]) -> None:
    """Tells all callbacks all messages."""
    for callback in callbacks:
        for message in messages:
            callback.on_warning(message)


class PythonWarnings(Callback):
    """Turns warnings into Python's."""

    def on_warning(self, message: str) -> None:
        """Calls `warnings.warn`."""
        warnings.warn(message, stacklevel=4)  # where `fit` is called, as a rule
