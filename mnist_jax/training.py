"""`fit`: from a Config to trained parameters, with every epoch measured and written down."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax

from mnist_jax import devices, runs
from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.errors import NonFiniteError, UsageError
from mnist_jax.metrics import NEVER, MetricSums
from mnist_jax.models import MODELS, count_parameters
from mnist_jax.programs import Programs


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        params: the trained parameters, on the device; None for a run that had ended before.
        record: the content of result.json.
        workdir: the run's folder.
    """

    params: Any
    record: dict[str, Any]
    workdir: Path


class Observer:
    """Watches a run; cannot change it. The methods do nothing here and are called in this order."""

    def on_load(self, config: Config) -> None:
        """The data set is loaded next, or made: that takes ten seconds once."""

    def on_notice(self, text: str) -> None:
        """Something the user must be told, such as another data set than asked for."""

    def on_start(
        self, config: Config, dataset: Dataset, model: nn.Module, device: jax.Device, workdir: Path
    ) -> None:
        """All is loaded; compilation comes next."""

    def on_call(
        self, epoch: int, step: int, last_step: int, sums: MetricSums, train_s: float
    ) -> None:
        """Training stands at `step` of the epoch's `last_step` (0: the epoch begins).

        `sums` and `train_s`, seconds without compilation, are the epoch's so far.
        """

    def on_epoch(self, row: dict[str, Any]) -> None:
        """An epoch has been trained and evaluated; `row` is its line of metrics.jsonl."""

    def on_end(self, result: Result) -> None:
        """The run is complete, now or since earlier."""


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with the epsilon that Keras takes by default."""
    return optax.adam(config.learning_rate, eps=1e-7)


def fit(config: Config, *, observer: Observer | None = None, import_s: float = 0.0) -> Result:
    """Trains as `config` says and evaluates on the test images after every epoch.

    The last epoch's parameters are the result: the test images choose nothing.

    Args:
        config: what to train on what, and how.
        observer: is told what happens.
        import_s: seconds the caller spent on imports, for the record of timings.

    Returns:
        The trained parameters, and the record that also stands in result.json.

    Raises:
        UsageError: the config does not fit the data set, the device or the run's folder.
        DataError: the data set cannot be had.
        NonFiniteError: the loss became NaN or infinite.
        DeviceError: the platform is absent, or the run's folder cannot be written.
    """
    device = devices.select_device(config.platform)
    precision = devices.MATMUL_PRECISION[config.precision]
    with jax.default_device(device), jax.default_matmul_precision(precision):
        return _fit(config, observer or Observer(), device, import_s)


def _fit(config: Config, observer: Observer, device: jax.Device, import_s: float) -> Result:
    started = time.perf_counter()
    dtype = devices.compute_dtype(config.precision, device)
    observer.on_load(config)
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir)
    data_s = time.perf_counter() - started
    notices = [
        *dataset.notices,
        *devices.keep_compiled(config.compilation_cache),
        *devices.slow_precision(config.precision, device),
    ]
    config = dataclasses.replace(config, dataset=dataset.name)
    if config.batch_size > (size := len(dataset.train.label)):
        raise UsageError(
            f"batch_size is {config.batch_size}; allowed is 1 to {size}, the number of training "
            f"images in {dataset.name}; change --batch_size"
        )
    run = runs.Run(config.workdir or runs.default_folder(config), config)
    if run.result is not None:
        result = Result(None, run.result, run.folder)
        observer.on_end(result)
        return result
    environment = runs.environment(device)
    run.write_environment(environment)
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    for notice in notices:
        observer.on_notice(notice)
    observer.on_start(config, dataset, model, device, run.folder)

    programs = Programs(
        model,
        make_optimizer(config),
        dataset,
        seed=config.seed,
        batch_size=config.batch_size,
        normalize=config.normalize,
        steps_per_call=config.steps_per_call,
        device=device,
    )
    last_step = config.epochs * programs.steps_per_epoch
    if config.max_steps is not None:
        last_step = min(last_step, config.max_steps)
    state = programs.init()
    step, epoch, row, test, train_s = 0, 0, {}, MetricSums.zeros(), 0.0
    while step < last_step:
        epoch += 1
        epoch_steps = min(programs.steps_per_epoch, last_step - step)
        before = dict(programs.seconds)
        observer.on_call(epoch, 0, epoch_steps, MetricSums.zeros(), 0.0)
        order = programs.order(epoch - 1)
        train, i = MetricSums.zeros(), 0
        while i < epoch_steps:
            state, train, i = programs.train(state, train, order, i, epoch_steps)
            # The host reads three numbers of each call: its only wait for the device.
            _check_finite(train, config)
            train_s = programs.seconds["train_s"] - before["train_s"]
            observer.on_call(epoch, i, epoch_steps, train, train_s)
        step += epoch_steps
        test = programs.evaluate(state.params)
        if not math.isfinite(test.loss):
            raise _not_finite(step, config)
        row = {
            "epoch": epoch,
            "step": step,
            "train/loss": train.loss,
            "train/accuracy": train.accuracy,
            "test/loss": test.loss,
            "test/accuracy": test.accuracy,
            "train_s": train_s,
            "eval_s": programs.seconds["eval_s"] - before["eval_s"],
            "images_per_s": int(train.count) / train_s,
        }
        run.append_metrics(row)
        observer.on_epoch(row)

    record = {
        "model": config.model,
        "dataset": dataset.name,
        "parameters": count_parameters(state.params),
        "epochs": epoch,
        "steps": step,
        "seed": config.seed,
        "test_accuracy": row["test/accuracy"],
        "test_correct": int(test.correct),
        "test_count": int(test.count),
        "train_accuracy": row["train/accuracy"],
        "params_sha256": runs.params_sha256(state.params),
        "timings": {
            "import_s": import_s,
            "data_s": data_s,
            **programs.seconds,
            "total_s": import_s + time.perf_counter() - started,
        },
        "notices": notices,
        "devices": [str(device)],
        "config": config.to_json(),
        "environment": environment,
    }
    run.finish(record)
    result = Result(state.params, record, run.folder)
    observer.on_end(result)
    return result


def _check_finite(sums: MetricSums, config: Config) -> None:
    if (step := int(sums.first_nonfinite)) != NEVER:
        raise _not_finite(step, config)


def _not_finite(step: int, config: Config) -> NonFiniteError:
    return NonFiniteError(
        f"the loss is not finite at step {step} (learning_rate {config.learning_rate:g}); "
        "a smaller --learning_rate usually helps"
    )
