"""`fit`: from a Config to trained parameters, with every epoch evaluated, saved and reported."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.data.split import hold_out
from mnist_jax.errors import InterruptedRunError, NonFiniteError, UsageError
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import MODELS, check_model
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel import distributed
from mnist_jax.parallel.mesh import compute_dtype, make_mesh, select_devices, to_host, use_device
from mnist_jax.runs import environment, results
from mnist_jax.runs.checkpoint import Progress
from mnist_jax.runs.run_dir import ENVIRONMENT, RunDir, default_folder
from mnist_jax.signals import Stop
from mnist_jax.steps import num_batches
from mnist_jax.trainer import Trainer

Notify = Callable[..., None]  # calls a method of every callback: its name, then its arguments


def fit(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    import_s: float = 0.0,
    stop: Stop | None = None,
) -> Result:
    """Trains as `config` says, and evaluates on the test images after every epoch.

    The parameters of the last epoch are the result: the test images choose nothing. Given the
    `workdir` of an interrupted run, `fit` resumes from its newest checkpoint, to the same bits.

    After `jax.distributed.initialize`, all processes must call this with the same config. They
    train one run together; process 0 writes its folder.

    Args:
        config: what to train, and how.
        callbacks: are told what happens, in process 0.
        import_s: seconds the caller spent on imports, for the timings.
        stop: ends the run early, with a checkpoint.

    Raises:
        UsageError: the config does not fit the data set, the devices, the run's folder or the other
            processes.
        DataError: the data set cannot be loaded.
        CheckpointError: the run's checkpoints cannot be used.
        NonFiniteError: the loss or a gradient became NaN or infinite.
        DeviceError: devices are missing, or the run's folder cannot be written.
        InterruptedRunError: `stop` has a signal; the run is saved.
    """
    started = time.perf_counter() - import_s
    config = config.resolve()
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(use_device(config.platform, config.precision))
        if not distributed.is_primary():
            callbacks = ()
        for callback in callbacks:
            stack.callback(callback.close)

        def notify(event: str, *args: Any) -> None:
            for callback in callbacks:
                getattr(callback, event)(*args)

        # All that can be refused is refused before the run's folder is made.
        notify("on_fit_begin", config)
        mesh = make_mesh(select_devices(device, config.devices), config.seeds)
        dtype = compute_dtype(config.precision, device)
        model = MODELS[config.model](dtype=dtype, **config.model_options())
        check_model(config.model, model)
        data_started = time.perf_counter()
        config, dataset = _load_data(config)
        timings = {"import_s": import_s, "data_s": time.perf_counter() - data_started}
        warnings = list(dataset.warnings)
        if config.precision == "bfloat16" and device.platform == "cpu":
            warnings.append("bfloat16 on a CPU is slower than float32; only its accuracy is real")
        for warning in warnings:
            notify("on_warning", warning)
        notify("on_data_loaded", dataset)
        where = environment.describe(device)
        if jax.process_count() > 1:
            distributed.check_same(_must_agree(config, dataset, where))

        run: Any = None  # a RunDir in process 0

        def open_folder() -> tuple[str, dict[str, Any] | None]:
            nonlocal run
            run = RunDir(config.workdir or default_folder(config), config)
            stack.callback(run.close)
            if run.result is None:
                run.write_json(ENVIRONMENT, where)
            return str(run.folder), run.result

        folder, record = distributed.on_primary(open_folder)
        if record is not None:
            result = Result(None, record, Path(folder))
            notify("on_train_end", result)
            return result
        assert config.batch_size is not None and config.epochs is not None, "resolved"
        total_steps = config.epochs * num_batches(len(dataset.train.label), config.batch_size)
        tx = make_optimizer(config, total_steps)
        trainer = Trainer(model, tx, dataset, config, mesh)
        loop = _Loop(trainer, run, notify, stop or Stop(), timings, started)
        loop.restore()
        devices, step = list(mesh.devices.flat), loop.progress.step
        notify("on_train_begin", config, dataset, model, devices, Path(folder), step)
        progress = loop.run(min(total_steps, config.max_steps or total_steps))

        progress.seconds = loop.seconds()
        record = results.record(config, progress, warnings, devices, where)
        distributed.on_primary(lambda: run.finish(record))
        result = Result(trainer.eval_params(loop.progress.state), record, Path(folder))
        notify("on_train_end", result)
        return result


def _load_data(config: Config) -> tuple[Config, Dataset]:
    """The config with the data set's name, and the data set."""
    assert config.batch_size is not None, "the config is resolved"
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir)
    if config.validation:
        train, validation = hold_out(dataset.train, config.validation)
        dataset = dataclasses.replace(dataset, train=train, validation=validation)
    if config.batch_size > (size := len(dataset.train.label)):
        raise UsageError(
            f"batch_size is {config.batch_size}; allowed is 1 to {size}, the number of training "
            f"images in {dataset.name}; change --batch_size"
        )
    return dataclasses.replace(config, dataset=dataset.name), dataset


def _must_agree(config: Config, dataset: Dataset, where: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all processes of a run; the data set as a digest."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves((dataset.train, dataset.test)):
        digest.update(array.tobytes())
    return {
        **config.hyperparameters(),
        **{name: getattr(config, name) for name in ("devices", "debug")},
        **{name: where[name] for name in (*environment.PACKAGES, "platform", "devices")},
        "images of the data set": digest.hexdigest()[:16],
    }


@dataclasses.dataclass
class _Loop:
    """Trains, evaluates, saves and reports, epoch after epoch, until the last step or a signal."""

    trainer: Trainer
    run_dir: RunDir  # used in process 0 only
    notify: Notify
    stop: Stop
    timings: dict[str, float]  # import_s and data_s
    started: float  # a time of `time.perf_counter`
    progress: Progress = dataclasses.field(init=False)
    earlier: dict[str, float] = dataclasses.field(default_factory=dict)  # timings before a resume
    diverged: set[int] = dataclasses.field(default_factory=set)  # seeds that a warning has named

    def restore(self) -> None:
        """Continues from the newest checkpoint; a new run saves its initial state."""
        start = Progress(self.trainer.init(), Metrics.zeros(self.trainer.config.seeds))
        arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), start.arrays())

        def load() -> list[Any] | None:
            nonlocal arrays
            if (found := self.run_dir.restore(arrays)) is None:
                return None
            arrays, *rest = found
            return rest

        found = distributed.on_primary(load)
        if found is None:
            self.progress = start
            self.save()  # writes while the training program compiles
        else:
            metadata, warnings = found
            arrays = distributed.broadcast_arrays(arrays)
            state = self.trainer.put_state(arrays["state"])
            self.progress = Progress(state, arrays["metrics"], **metadata)
            self.earlier = self.progress.seconds
            for warning in warnings:
                self.notify("on_warning", warning)
        distributed.on_primary(lambda: self.run_dir.write_metrics(self.progress.rows))
        self.stop.armed = True

    def run(self, last_step: int) -> Progress:
        """Trains up to `last_step` updates; returns the progress with NumPy arrays."""
        epoch_steps = self.trainer.steps_per_epoch
        while (done := self.progress.epoch * epoch_steps) < last_step:
            self._epoch(min(epoch_steps, last_step - done))
            row = self.progress.rows[-1]
            # On an accelerator an epoch can be shorter than the write of a checkpoint.
            may_save = distributed.on_primary(lambda: self.run_dir.end_epoch(self.progress.rows))
            if may_save or row["step"] == last_step:
                self.save()
            self.notify("on_epoch_end", row)
        distributed.on_primary(lambda: self.run_dir.wait_until_saved())
        return dataclasses.replace(self.progress, state=to_host(self.progress.state))

    def _epoch(self, steps: int) -> None:
        """Trains on the first `steps` batches of an epoch, and evaluates on all test images."""
        progress, trainer, config = self.progress, self.trainer, self.trainer.config
        epoch, eval_s = progress.epoch + 1, trainer.seconds["eval_s"]
        self.notify("on_epoch_begin", epoch, progress.batch, steps)
        order = trainer.permutation(progress.epoch)
        while progress.batch < steps:
            train_s = trainer.seconds["train_s"]
            state, metrics, batch = trainer.train(
                progress.state, progress.metrics, order, progress.batch, steps
            )
            diverged = np.ravel(metrics.first_nonfinite) != NEVER
            if diverged.all():
                step = int(np.max(metrics.first_nonfinite))  # of the last member to diverge
                raise NonFiniteError(
                    f"the loss or its gradient is not finite at step {step} (learning_rate "
                    f"{config.learning_rate:g}); a smaller --learning_rate usually helps; "
                    "JAX_DISABLE_JIT=1 JAX_DEBUG_NANS=1 shows the operation"
                )
            for seed in np.compress(diverged, config.all_seeds()).tolist():
                if seed not in self.diverged:
                    self.diverged.add(seed)
                    self.notify("on_warning", results.diverged_warning(seed))
            progress.state, progress.metrics, progress.batch = state, metrics, batch
            progress.train_s += trainer.seconds["train_s"] - train_s
            self.notify("on_chunk_end", epoch, batch, steps, metrics, progress.train_s)
            self._between_calls()
        found = {"train": progress.metrics}
        for name in trainer.eval_splits:
            for metrics in trainer.evaluate(progress.state, name):
                found[name] = metrics
                self._between_calls()
        step = progress.epoch * trainer.steps_per_epoch + steps
        if not np.any(np.isfinite(found["test"].loss_sum)):
            raise NonFiniteError(f"the test loss is not finite after step {step}")
        row = {
            "epoch": epoch,
            "step": step,
            **results.metrics_row(found),
            "train_s": progress.train_s,
            "eval_s": trainer.seconds["eval_s"] - eval_s,
            "images_per_s": int(np.sum(progress.metrics.count)) / progress.train_s,
        }
        progress.rows.append(row)
        progress.evaluation = results.evaluation(found)
        progress.epoch, progress.batch, progress.train_s = epoch, 0, 0.0
        progress.metrics = Metrics.zeros(config.seeds)

    def _between_calls(self) -> None:
        """Saves if a checkpoint is due; ends the run after a signal."""
        signal = distributed.any_signal(self.stop.signal)
        due = distributed.on_primary(lambda: self.run_dir.checkpoints.is_due())
        if due or signal is not None:
            self.save()
        if signal is not None:
            folder = distributed.on_primary(lambda: self.run_dir.wait_until_saved())
            raise InterruptedRunError(
                f"interrupted at step {self.progress.step}; to resume, run the same command with "
                f"--workdir={folder}",
                signal,
            )

    def save(self) -> None:
        """Starts to write a checkpoint."""
        progress = self.progress
        progress.seconds = self.seconds()
        host = dataclasses.replace(progress, state=to_host(progress.state))
        distributed.on_primary(lambda: self.run_dir.save(host))

    def seconds(self) -> dict[str, float]:
        """The timings of this process and of those before it."""
        total = {"total_s": time.perf_counter() - self.started}
        now = {**self.timings, **self.trainer.seconds, **total}
        return {name: self.earlier.get(name, 0.0) + value for name, value in now.items()}
