"""What a run tells whoever watches it: `fit` calls these methods, and they change no number."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Result:
    """What `fit` returns.

    `params` are the trained parameters (their EMA if the run keeps one), with a leading axis of
    members if `config.seeds` is set; None if the run was already complete.
    """

    params: Any = dataclasses.field(repr=False)
    record: dict[str, Any] = dataclasses.field(repr=False)  # the content of result.json
    workdir: Path  # the run's folder


class Callback:
    """Watches a run. Override what you need; every method does nothing by default.

    With several processes only process 0 calls them. An exception ends the run.
    """

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

    def on_epoch_begin(self, epoch: int, step: int, last_step: int) -> None:
        """Epoch `epoch` (from 1) starts, or resumes after `step` of its `last_step` updates."""

    def on_chunk_end(
        self, epoch: int, step: int, last_step: int, metrics: Metrics, train_s: float
    ) -> None:
        """One call of the compiled train steps ends, after `step` of the epoch's updates.

        Args:
            epoch, step, last_step: as in `on_epoch_begin`.
            metrics: of the epoch so far; NumPy arrays, with one value per member if there are any.
            train_s: seconds of training in this epoch so far, without compilation.
        """

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch is trained, evaluated and saved; `row` is its line of metrics.jsonl."""

    def on_train_end(self, result: Result) -> None:
        """The run is complete, now or since an earlier call of `fit`."""

    def close(self) -> None:
        """`fit` ends, also after an error."""
