"""TrainLoop: the epochs of a run, from its newest checkpoint to its last step."""

import copy
import dataclasses
import shlex
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mnist_jax.callbacks import Callback, warn
from mnist_jax.compiled_steps import Trainer
from mnist_jax.errors import InterruptedRunError, NonFiniteError
from mnist_jax.metrics import NEVER, Metrics, finite_mask
from mnist_jax.parallel import distributed
from mnist_jax.parallel.mesh import to_host
from mnist_jax.runs import results
from mnist_jax.runs.checkpoint import Progress
from mnist_jax.runs.run_dir import RunDir


@dataclasses.dataclass
class TrainLoop:
    """Trains, evaluates, saves and reports, epoch after epoch, until the last step or a signal."""

    trainer: Trainer
    run_dir: RunDir  # used in process 0 only
    callbacks: Sequence[Callback]
    timings: dict[str, float]  # import_s and data_s
    started: float  # a time of `time.perf_counter`
    progress: Progress = dataclasses.field(init=False)
    signals: list[int] = dataclasses.field(default_factory=list)  # one in it ends the run
    diverged: set[int] = dataclasses.field(default_factory=set)  # members that a warning has named

    def restore(self, params: Any = None, model_state: Any = None) -> list[str]:
        """Continues from the newest checkpoint; a new run saves its initial state.

        A new run starts from these parameters and model state, NumPy arrays, if they are given.
        Returns warnings.
        """
        members = self.trainer.config.num_members
        shapes = {"state": self.trainer.state_shapes(), "metrics": Metrics.zeros(members)}
        arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

        def load() -> tuple[dict[str, Any], list[str]] | None:
            nonlocal arrays
            if (checkpoint := self.run_dir.restore(arrays)) is None:
                return None
            arrays, metadata, warnings = checkpoint
            return metadata, warnings

        loaded, warnings = distributed.on_primary(load), []
        if loaded is None:
            state = self.trainer.init(params, model_state)
            self.progress = Progress(state, Metrics.zeros(members))
            self.save()  # writes while the training program compiles
        else:
            metadata, warnings = loaded
            arrays = distributed.broadcast_arrays(arrays)
            state = self.trainer.put_state(arrays["state"])
            self.progress = Progress(state, arrays["metrics"], **metadata)
        distributed.on_primary(lambda: self.run_dir.write_metrics(self.progress.rows))
        return warnings

    def run(self) -> Progress:
        """Trains to the last step; returns the progress with NumPy arrays."""
        steps_per_epoch, total_steps = self.trainer.steps_per_epoch, self.trainer.total_steps
        last_step = min(total_steps, self.trainer.config.max_steps or total_steps)
        while (done := self.progress.epoch * steps_per_epoch) < last_step:
            self._epoch(min(steps_per_epoch, last_step - done))
            row = self.progress.rows[-1]
            # On an accelerator an epoch can be shorter than the write of a checkpoint. Asked before
            # `write_metrics`, which may wait for that.
            is_saving = distributed.on_primary(lambda: self.run_dir.checkpoints.is_saving())
            distributed.on_primary(lambda: self.run_dir.write_metrics(self.progress.rows))
            if row["step"] == last_step or not is_saving:
                self.save()
            for callback in self.callbacks:
                callback.on_epoch_end(copy.deepcopy(row))  # its own, to change
            if row["step"] < last_step:  # a callback may have asked for the end
                self._between_calls()
        distributed.on_primary(lambda: self.run_dir.checkpoints.wait_until_finished())
        return self._snapshot()

    def _epoch(self, num_batches: int) -> None:
        """Trains on the first batches of an epoch; evaluates on the test and validation images."""
        progress, trainer = self.progress, self.trainer
        epoch, eval_s = progress.epoch + 1, trainer.seconds["eval_s"]
        for callback in self.callbacks:
            callback.on_epoch_begin(epoch, progress.batch, num_batches)
        order = trainer.permutation(progress.epoch)
        while progress.batch < num_batches:
            first_step, train_s = progress.step, trainer.seconds["train_s"]
            state, metrics, batch, log = trainer.train(
                progress.state, progress.metrics, order, progress.batch, num_batches
            )
            self._check_finite(metrics)
            progress.state, progress.metrics, progress.batch = state, metrics, batch
            progress.train_s += trainer.seconds["train_s"] - train_s
            for callback in self.callbacks:
                if log:
                    callback.on_steps(first_step, log)
                callback.on_chunk_end(epoch, batch, num_batches, metrics, progress.train_s)
            self._between_calls()
        evaluated = {"train": progress.metrics}
        for name in trainer.eval_splits:
            for metrics in trainer.evaluate(progress.state, name):
                evaluated[name] = metrics
                self._between_calls()
        step = progress.epoch * trainer.steps_per_epoch + num_batches
        for name, metrics in evaluated.items():  # sums can overflow where no step did
            if not np.any(np.isfinite(metrics.loss_sum)):
                raise NonFiniteError(f"the {name} loss is not finite after step {step}")
        row, progress.evaluation = results.evaluation(evaluated)
        if trainer.config.num_members is not None:  # only here one sees an epoch's last update
            self._warn_diverged(~np.array(finite_mask(row)))
        times = {
            "train_s": progress.train_s,
            "eval_s": trainer.seconds["eval_s"] - eval_s,
            "images_per_s": int(np.sum(progress.metrics.count)) / progress.train_s,
        }
        progress.rows.append({"epoch": epoch, "step": step, **row, **times})
        progress.epoch, progress.batch, progress.train_s = epoch, 0, 0.0
        progress.metrics = Metrics.zeros(trainer.config.num_members)

    def _check_finite(self, metrics: Metrics) -> None:
        """Ends the run if `steps.train_step` found a NaN or infinity in every member."""
        diverged = np.ravel(metrics.first_nonfinite) != NEVER
        if diverged.all():
            step = int(np.max(metrics.first_nonfinite))  # of the last member to diverge
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {step} (learning_rate "
                f"{self.trainer.config.learning_rate}); a smaller --learning_rate usually helps; "
                "JAX_DISABLE_JIT=1 JAX_DEBUG_NANS=1 shows the operation"
            )
        self._warn_diverged(diverged)

    def _warn_diverged(self, diverged: np.ndarray) -> None:
        """Warns of members, (members,) bool, once each."""
        if new := set(np.flatnonzero(diverged).tolist()) - self.diverged:
            self.diverged |= new
            labels = self.trainer.config.member_labels()
            warn(self.callbacks, [results.diverged_warning([labels[m] for m in sorted(new)])])

    def _between_calls(self) -> None:
        """Saves if a checkpoint is due; ends the run after a signal."""
        signals = [n for caught in distributed.allgather(self.signals) for n in caught]
        due = distributed.on_primary(lambda: self.run_dir.checkpoints.is_due())
        if due or signals:
            self.save()
        if signals:
            distributed.on_primary(lambda: self.run_dir.checkpoints.wait_until_finished())
            folder = distributed.on_primary(lambda: str(self.run_dir.folder))
            raise InterruptedRunError(
                f"interrupted at step {self.progress.step}; to resume, run the same command with "
                f"--workdir={shlex.quote(folder)}",
                signals[0],
            )

    def save(self) -> None:
        """Starts to write a checkpoint."""
        snapshot = self._snapshot()
        distributed.on_primary(lambda: self.run_dir.checkpoints.save(snapshot))

    def _snapshot(self) -> Progress:
        """The progress with NumPy arrays, and the timings of this process added to its own."""
        total_s = time.perf_counter() - self.started
        now = {**self.timings, **self.trainer.seconds, "total_s": total_s}
        earlier, state = self.progress.seconds, to_host(self.progress.state)
        seconds = {name: earlier.get(name, 0.0) + value for name, value in now.items()}
        return dataclasses.replace(self.progress, state=state, seconds=seconds)
