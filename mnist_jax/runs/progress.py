"""How far a run has come: saved while it goes on, found again when it is continued."""

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np

from mnist_jax.config import Config
from mnist_jax.errors import CheckpointError, InterruptedRunError
from mnist_jax.metrics import Metrics
from mnist_jax.parallel.mesh import Layout
from mnist_jax.parallel.team import Team
from mnist_jax.runs.run_dir import Run
from mnist_jax.signals import Stop
from mnist_jax.steps import TrainState, step_of

# What every line of metrics.jsonl has.
MEASURED = {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "train_s"}


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint holds.

    Attributes:
        state: after the last update.
        sums: the metrics of the epoch begun.
        epoch: epochs completed.
        batch: updates of the epoch begun.
        train_s: seconds they took.
        rows: the lines of metrics.jsonl.
        end: what result.json says of the run if it ends here.
        seconds: timings so far, of all processes that worked on the run.
    """

    state: TrainState
    sums: Metrics = dataclasses.field(default_factory=Metrics.zeros)
    epoch: int = 0
    batch: int = 0
    train_s: float = 0.0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    end: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    ARRAYS = ("state", "sums")

    @property
    def step(self) -> int:
        """Updates completed. Reads the device."""
        return step_of(self.state)

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays, and what JSON can hold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: fields.pop(name) for name in self.ARRAYS}
        return arrays, fields

    @classmethod
    def join(cls, arrays: dict[str, Any], rest: dict[str, Any]) -> "Progress":
        """What `split` made two of.

        Raises:
            CheckpointError: the rest is not what `split` returns.
        """
        kinds = {f.name: type(f.default) for f in dataclasses.fields(cls) if f.name not in arrays}
        kinds |= {"rows": list, "end": dict, "seconds": dict}
        if {name: type(value) for name, value in rest.items()} != kinds:
            raise CheckpointError(f"the checkpoint holds other things than {', '.join(kinds)}")
        rows, end, seconds = rest["rows"], rest["end"], rest["seconds"]
        members = np.shape(arrays["sums"].count)
        if not all(_holds_numbers(values, members) for values in (*rows, end, seconds)):
            raise CheckpointError("the checkpoint's rows, end or seconds hold other than numbers")
        epochs = [row.get("epoch") for row in rows if row.keys() >= MEASURED]
        if epochs != list(range(1, len(rows) + 1)) or rest["epoch"] != len(rows):
            raise CheckpointError(f"the checkpoint's rows are not those of {rest['epoch']} epochs")
        if not 0 <= rest["batch"] <= step_of(arrays["state"]):
            raise CheckpointError(f"the checkpoint stands at batch {rest['batch']} of an epoch")
        return cls(**arrays, **rest)


def _holds_numbers(values: Any, members: tuple[int, ...]) -> bool:
    """Whether it is a dict of numbers, none too large to reckon with.

    Of an ensemble, whose size is then in `members`, a metric is a list of one for each member, and
    a loss may be None.
    """
    if not isinstance(values, dict):
        return False
    for name, value in values.items():
        numbers = [value]
        if members and re.search("/|_accuracy$|_correct$", name):
            if not isinstance(value, list) or len(value) != members[0]:
                return False
            numbers = [n for n in value if not (n is None and name.endswith("/loss"))]
        if not all(type(n) is float or (type(n) is int and abs(n) < 2**63) for n in numbers):
            return False
    return True


class Keeper:
    """Saves a run's progress when it is time to, and ends the run when it is asked to.

    Of several processes one saves, and all end together.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        stop: Stop,
        key: jax.Array,
        layout: Layout,
        team: Team,
    ):
        self._run, self._every_s, self._stop = run, config.checkpoint_every, stop
        self._layout, self._team = layout, team
        self._key = jax.random.key_data(key).tolist()
        self._saved: tuple[int, int] | None = None  # epochs and updates completed
        self._saved_at = time.monotonic()

    def restore(self, start: TrainState, sums: Metrics) -> tuple[Progress, list[str]]:
        """The progress of the newest checkpoint, or that of a run not begun.

        Args:
            start: the state that a run begins with, on the devices.
            sums: the metrics that an epoch begins with.

        Returns:
            The progress, and a notice for each checkpoint that could not be used.

        Raises:
            CheckpointError: there was a checkpoint and none can be used.
        """
        progress, notices = Progress(start, sums), []
        template = {**progress.split()[0], "state": self._layout.shapes(start)}
        found = self._run.restore(template)
        if self._team.decide(found is not None):
            if found is None:  # process 0 has it
                zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
                found = zeros, {}, []
            arrays, rest, notices = found
            arrays, rest = self._team.broadcast(arrays, rest)
            if rest.pop("key", None) != self._key:
                raise CheckpointError("the checkpoint is of another seed; choose another --workdir")
            progress = Progress.join(arrays, rest)
            progress.state = self._layout.place_state(progress.state)
            self._saved = progress.epoch, progress.step
        self._run.write_metrics(progress.rows)
        if self._saved is None:
            self.save(progress)  # written while the training's program is compiled
        return progress, notices

    def end_epoch(self, progress: Progress, *, last: bool) -> None:
        """Adds an epoch's line to metrics.jsonl and saves the progress.

        Not while the save before is still being written, which on an accelerator can take longer
        than an epoch: then a later epoch is saved. The last one is in any case, and every one is
        with --checkpoint_every=0.
        """
        self._run.append_metrics(progress.rows[-1])
        passed_over = self._every_s > 0 and not last and self._run.is_saving()
        if not self._team.decide(passed_over):
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Saves it in the background, unless it has not moved since the last time."""
        place = progress.epoch, progress.step
        if place != self._saved:
            arrays, rest = progress.split()
            arrays["state"] = self._layout.fetch(progress.state)
            self._run.save(*place, arrays, {**rest, "key": self._key})
        self._saved = place
        self._saved_at = time.monotonic()

    def look(self, progress: Progress) -> None:
        """To be called between calls.

        Raises:
            InterruptedRunError: a signal has come; the progress is saved.
        """
        signal = self._team.ask_to_stop(self._stop.signal)
        due = time.monotonic() - self._saved_at >= self._every_s
        due, signal = self._team.decide((due, signal))
        if due or signal is not None:
            self.save(progress)
        if signal is not None:
            self._run.finish_saving()
            raise InterruptedRunError(
                f"interrupted at step {progress.step}; the same command with "
                f"--workdir={self._run.folder} goes on from there",
                signal,
            )
