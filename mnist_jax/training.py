"""`fit`: from a Config to trained parameters, with every epoch measured and written down."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.errors import MnistJaxError, NonFiniteError, UsageError
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import MODELS, check_model, count_parameters, param_shapes
from mnist_jax.optimizer import ema_params, make_optimizer
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.mesh import Layout
from mnist_jax.parallel.team import Team
from mnist_jax.reporting import profiling
from mnist_jax.runs import environment
from mnist_jax.runs import results as record
from mnist_jax.runs import run_dir as runs
from mnist_jax.runs.progress import Keeper, Progress
from mnist_jax.signals import Stop
from mnist_jax.steps import num_batches
from mnist_jax.trainer import Trainer, check_memory


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        params: the trained parameters, on the device, or of a run on several as NumPy arrays; None
            for a run that had ended before.
        record: the content of result.json.
        workdir: the run's folder.
        report: the page with its pictures, where that was asked for.
    """

    params: Any = dataclasses.field(repr=False)
    record: dict[str, Any] = dataclasses.field(repr=False)
    workdir: Path
    report: Path | None = None


class Callback:
    """Watches a run; cannot change it. The methods do nothing here and are called in this order."""

    def on_load(self, config: Config) -> None:
        """The data set is loaded next, or made: that takes ten seconds once."""

    def on_warning(self, text: str) -> None:
        """Something the user must be told, such as another data set than asked for."""

    def on_train_begin(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        devices: Sequence[jax.Device],
        workdir: Path,
    ) -> None:
        """All is loaded; compilation comes next. `devices` are those of all processes."""

    def on_resume(self, step: int) -> None:
        """The run goes on after `step` updates, from a checkpoint."""

    def on_chunk_end(
        self, epoch: int, step: int, last_step: int, sums: Metrics, train_s: float
    ) -> None:
        """Training stands at `step` of the epoch's `last_step`; it begins or goes on there, or a
        call has ended there.

        `sums` and `train_s`, seconds without compilation, are the epoch's so far.
        """

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """An epoch has been trained and evaluated; `row` is its line of metrics.jsonl."""

    def on_train_end(self, result: Result) -> None:
        """The run is complete, now or since earlier."""


def fit(
    config: Config,
    *,
    observer: Callback | None = None,
    import_s: float = 0.0,
    stop: Stop | None = None,
) -> Result:
    """Trains as `config` says and evaluates on the test images after every epoch.

    The last epoch's parameters are the result: the test images choose nothing. A run that was
    interrupted goes on from its newest checkpoint, to the same bits, when its `workdir` is given.

    Where the caller has called `jax.distributed.initialize`, all processes must call this alike.
    Together they are one run, on the devices of all, and process 0 writes its folder.

    Args:
        config: what to train on what, and how.
        observer: is told what happens; of several processes only that of process 0.
        import_s: seconds the caller spent on imports, for the record of timings.
        stop: asks the run to end early, with a checkpoint.

    Returns:
        The trained parameters, and the record that also stands in result.json.

    Raises:
        UsageError: the config does not fit the data set, the device, the run's folder or the other
            processes.
        DataError: the data set cannot be had.
        CheckpointError: the run's checkpoints cannot be used.
        NonFiniteError: the loss or a gradient became NaN or infinite.
        DeviceError: the platform or so many devices are absent, or the run's folder cannot be
            written.
        InterruptedRunError: `stop` had a signal.
    """
    started = time.perf_counter() - import_s
    with devices.running_on(config.platform, config.precision) as device:
        timings, team = {"import_s": import_s}, Team()
        if observer is None or not team.leads:
            observer = Callback()
        return _fit(config, observer, stop or Stop(), device, team, timings, started)


def _fit(
    config: Config,
    observer: Callback,
    stop: Stop,
    device: jax.Device,
    team: Team,
    timings: dict[str, float],
    started: float,
) -> Result:
    layout = _layout(config, device)
    dtype = devices.compute_dtype(config.precision, device)
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    check_model(config.model, model)
    if config.tensorboard:
        runs.summary_writer()  # its absence is better found before a folder is made
    if config.profile is not None:
        profiling.make_folder(config.profile)
    pictures = team.leads and (config.tensorboard or config.report)
    observer.on_load(config)
    data_started = time.perf_counter()
    config, dataset = _load(config)
    timings["data_s"] = time.perf_counter() - data_started
    notices = [*dataset.notices, *devices.slow_precision(config.precision, device)]
    for notice in notices:
        observer.on_warning(notice)
    where = environment.describe(device)
    if team.count > 1:
        team.check_same(_must_agree(config, dataset, where))
    run, more = runs.open_run(config, team)
    with contextlib.closing(run):
        for notice in more:
            observer.on_warning(notice)
        if run.result is not None:
            page = _page(run, config, dataset, observer) if pictures and config.report else None
            result = Result(None, run.result, run.folder, page)
            observer.on_train_end(result)
            return result
        run.write_environment(where)
        observer.on_train_begin(config, dataset, model, layout.devices, run.folder)
        last_step = config.epochs * num_batches(len(dataset.train.label), config.batch_size)
        if last_step > NEVER:
            raise UsageError(
                f"epochs is {config.epochs}, of {last_step:,} steps in all; allowed are up to "
                f"{NEVER:,}; change --epochs"
            )
        tx = make_optimizer(config, last_step)
        check_memory(config, model, tx, device, layout)
        programs = Trainer(model, tx, dataset, config, layout, team)
        if config.max_steps is not None:
            last_step = min(last_step, config.max_steps)
        if config.profile_steps is not None and config.profile_steps[0] > last_step:
            raise UsageError(
                f"profile_steps begin at {config.profile_steps[0]}, after the run's {last_step} "
                "steps; change --profile_steps"
            )

        stop.armed = True
        keeper = Keeper(run, config, stop, programs.root_key, layout, team)
        progress, unusable = keeper.restore(programs.init(), Metrics.zeros(config.seeds))
        for notice in unusable:
            observer.on_warning(notice)
        if step := progress.step:
            observer.on_resume(step)
        elif pictures and config.tensorboard:
            from mnist_jax.reporting import report  # takes half a second: only when needed

            report.at_start(run, dataset)
        earlier = progress.seconds

        def seconds() -> dict[str, float]:
            """Of this process and those before it."""
            now = {**timings, **programs.seconds, "total_s": time.perf_counter() - started}
            return {name: earlier.get(name, 0.0) + s for name, s in now.items()}

        while (step := progress.epoch * programs.steps_per_epoch) < last_step:
            steps = min(programs.steps_per_epoch, last_step - step)
            for _ in run_epoch(programs, progress, steps, config, observer):
                progress.seconds = seconds()
                keeper.look(progress)
            progress.seconds = seconds()
            keeper.end_epoch(progress, last=step + steps == last_step)
            observer.on_epoch_end(progress.rows[-1])
        run.finish_saving()

        state = layout.fetch(progress.state) if layout.mesh else progress.state
        end = record.outcome(config, dataclasses.replace(progress, state=state))
        notices += map(record.left_out, end.get("nonfinite_seeds", ()))
        content = {
            "model": config.model,
            "dataset": dataset.name,
            "parameters": count_parameters(param_shapes(model)),
            "epochs": progress.epoch,
            "steps": last_step,
            "seed": config.seed,
            **end,
            "timings": seconds(),
            "notices": notices,
            "devices": list(map(str, layout.devices)),
            "config": config.to_json(),
            "environment": where,
        }
        run.finish(content)
        params = ema_params(state.params, state.opt_state, config.ema_decay)
        page = _page(run, config, dataset, observer) if pictures else None
        result = Result(params, content, run.folder, page)
        observer.on_train_end(result)
        return result


def _layout(config: Config, device: jax.Device) -> Layout:
    """How the run lies on its devices.

    Raises:
        DeviceError: there are too few.
        UsageError: they do not divide the microbatches.
    """
    layout = Layout.over(devices.select_devices(device, config.devices), config.seeds)
    parts, count = config.microbatches, len(layout.devices)
    if parts > 1 and config.seeds is None and parts % count:
        raise UsageError(
            f"microbatches is {parts}, which {count} devices do not divide; change --microbatches "
            "or --devices"
        )
    return layout


def _load(config: Config) -> tuple[Config, Dataset]:
    """The data set, with images held out if the config says so, and the config with its name.

    Raises:
        DataError: it cannot be had.
        UsageError: it has too few images.
    """
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, manual_dir=config.manual_dir)
    if config.validation:
        dataset = dataset.hold_out(config.validation)
    if config.batch_size > (size := len(dataset.train.label)):
        raise UsageError(
            f"batch_size is {config.batch_size}; allowed is 1 to {size}, the number of training "
            f"images in {dataset.name}; change --batch_size"
        )
    return dataclasses.replace(config, dataset=dataset.name), dataset


def _page(run: runs.Run, config: Config, dataset: Dataset, observer: Callback) -> Path | None:
    """The pictures that the config asks for of a complete run; without them it is as complete."""
    from mnist_jax.reporting import report

    try:
        return report.at_end(run, config, dataset)
    except (MnistJaxError, OSError) as error:
        observer.on_warning(f"no report was made: {error}")
        return None


def _must_agree(config: Config, dataset: Dataset, where: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in all processes of a run, the data set as a digest."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves((dataset.train, dataset.test)):
        digest.update(array.tobytes())
    versions = {name: where[name] for name in environment.PACKAGES}
    data = {"images of the data set": digest.hexdigest()[:16]}
    execution = {name: getattr(config, name) for name in ("devices", "debug")}
    platform = where["platform"]
    here = {"platform": platform, "number of devices": len(jax.local_devices(backend=platform))}
    return {**config.hyperparameters(), **execution, **versions, **here, **data}


def run_epoch(
    programs: Trainer, progress: Progress, steps: int, config: Config, observer: Callback
) -> Iterator[None]:
    """Trains for the first `steps` batches of an epoch and evaluates on all test images.

    Yields between calls, where `progress` is fit to be saved. At the end the epoch is completed:
    its line is added to `progress.rows`.

    Args:
        programs: what is compiled, and the data.
        progress: where the run stands, inside the epoch or before it; moved on.
        steps: all of the epoch's, or fewer where the run ends.
        config: named in the error.
        observer: is told of every call.

    Raises:
        NonFiniteError: a training loss, its gradient or the test loss is NaN or infinite.
    """
    epoch, before_s = progress.epoch + 1, progress.train_s
    before = dict(programs.seconds)
    observer.on_chunk_end(epoch, progress.batch, steps, progress.sums, progress.train_s)
    order = programs.order(progress.epoch)
    while progress.batch < steps:
        state, sums, batch = programs.train(
            progress.state, progress.sums, order, progress.batch, steps
        )
        lost = sums.first_nonfinite != NEVER
        if np.all(lost):
            member = int(np.argmax(sums.first_nonfinite))  # the last to be lost
            bad_step, cause = int(np.ravel(sums.first_nonfinite)[member]), None
            if config.debug:
                at = progress.state, order, progress.batch
                try:
                    programs.locate_nan(*at, bad_step, member)
                except FloatingPointError as error:
                    cause = error
            raise _not_finite(bad_step, config) from cause
        for member in np.flatnonzero(lost).tolist():
            if not record.was_lost(member, progress):
                observer.on_warning(record.left_out(config.all_seeds()[member]))
        progress.state, progress.sums, progress.batch = state, sums, batch
        progress.train_s = before_s + programs.seconds["train_s"] - before["train_s"]
        observer.on_chunk_end(epoch, batch, steps, sums, progress.train_s)
        yield
    found = {"train": progress.sums}
    for name in programs.eval_splits:
        for so_far in programs.evaluate(progress.state, name):
            found[name] = so_far
            yield
    step = progress.epoch * programs.steps_per_epoch + steps
    if not np.any(np.isfinite(found["test"].loss_sum)):
        raise _not_finite(step, config)
    row = {
        "epoch": epoch,
        "step": step,
        **record.metrics(found),
        "train_s": progress.train_s,
        "eval_s": programs.seconds["eval_s"] - before["eval_s"],
        "images_per_s": int(np.sum(progress.sums.count)) / progress.train_s,
    }
    progress.rows.append(row)
    progress.end = record.counts(found)
    progress.epoch, progress.batch, progress.train_s = epoch, 0, 0.0
    progress.sums = Metrics.zeros(config.seeds)


def _not_finite(step: int, config: Config) -> NonFiniteError:
    return NonFiniteError(
        f"the loss or its gradient is not finite at step {step} "
        f"(learning_rate {config.learning_rate:g}); a smaller --learning_rate usually helps"
    )
