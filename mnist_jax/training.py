"""`fit`: from a Config to trained parameters, with every epoch evaluated, saved and reported."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mnist_jax.callbacks import Callback, PythonWarnings, Result, warn
from mnist_jax.compiled_steps import Trainer
from mnist_jax.compiler import COMPUTE_DTYPE, check_precision, enable_compilation_cache, use_device
from mnist_jax.config import Config
from mnist_jax.data import Dataset, DataSpec, load_dataset
from mnist_jax.data.dataset import hold_out
from mnist_jax.errors import CheckpointError, UsageError, first_line
from mnist_jax.fork import added_by, keep_names, load_fork
from mnist_jax.metrics import finite_members
from mnist_jax.models import make_model, trace_training, variable_shapes
from mnist_jax.parallel import distributed
from mnist_jax.parallel.mesh import make_mesh, select_devices, to_host
from mnist_jax.runs import environment, results
from mnist_jax.runs.checkpoint import Progress, load_saved, stacked_shapes, variables_of
from mnist_jax.runs.run_dir import RunDir, has_begun, has_result, make_default_folder, read_config
from mnist_jax.runs.statistics import percent
from mnist_jax.signals import catch_signals
from mnist_jax.train_loop import TrainLoop


def fit(
    config: Config,
    *,
    dataset: Dataset | None = None,
    init_params: Any = None,
    callbacks: Sequence[Callback] | None = None,
    import_s: float = 0.0,
) -> Result:
    """Trains as `config` says, and evaluates on the test images after every epoch.

    The parameters of the last epoch are the result: the test images choose nothing. Given the
    `workdir` of an interrupted run, `fit` resumes from its newest checkpoint, to the same bits.

    With a `coordinator`, or after `jax.distributed.initialize`, all processes must call this with
    the same config. They train one run together; process 0 writes its folder.

    In the main thread, a signal of `signals.NAMES` ends the training early, with a checkpoint,
    unless the program handles it in a way of its own, as `asyncio.run` does Ctrl-C.

    Args:
        config: what to train, and how.
        dataset: your own images, from `Dataset.from_arrays`; None for those that `config` names.
        init_params: parameters to start from, such as those of a `Result`; None for random ones, or
            those of `config.init_from`. With members, stacked or the same for all.
        callbacks: their methods are called, in process 0. None: what the config asks for, with the
            console, as from `reporting.make_callbacks`, and with the compilation cache. If none has
            `on_warning`, warnings become Python's.
        import_s: seconds the caller spent on imports, for the timings.

    Raises:
        UsageError: the config does not fit the data set, the devices, the run's folder or the other
            processes.
        DataError: the data set cannot be loaded.
        CheckpointError: the run's checkpoints, or the initial parameters, cannot be used.
        NonFiniteError: the loss or a gradient became NaN or infinite.
        DeviceError: devices or memory are missing, or a folder cannot be written.
        InterruptedRunError: a signal came; the run is saved.
    """
    started = time.perf_counter() - import_s
    config = config.resolve()
    distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    fork = None if config.fork is None else load_fork(config.fork)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(use_device(config.platform, config.precision))
        callbacks, warnings = _choose_callbacks(config, callbacks)
        for callback in callbacks:
            stack.callback(callback.close)
            callback.on_fit_begin(config)
        # All that can be refused is refused before the run's folder is made.
        mesh = make_mesh(select_devices(device, config.devices), config.num_members)
        data_started = time.perf_counter()
        config, dataset = _load_data(config, dataset)
        if init_params is not None:  # what the run began from, by its digest
            given = f"arrays-{results.params_sha256(to_host(init_params))[:16]}"
            config = dataclasses.replace(config, init_from=Path(given))
        timings = {"import_s": import_s, "data_s": time.perf_counter() - data_started}
        check_precision(config.precision, device)
        data = dataset.spec
        model = make_model(**config.model_arguments(data), dtype=COMPUTE_DTYPE[config.precision])
        is_complete = config.workdir is not None and has_result(config.workdir)
        resumes = is_complete or (config.workdir is not None and has_begun(config.workdir))
        resumes = distributed.broadcast(resumes)  # others need not see the folder of process 0
        if not resumes:
            config.check_options()
        initial = (None, None) if resumes else _initial(config, init_params, model, warnings)
        log = distributed.broadcast(_overridden(callbacks, "on_steps"))
        trainer = Trainer(model, dataset, config, mesh, log=log)
        if not is_complete:
            _check_dtype(model, config)
            trainer.check_step()
        where = environment.describe(device) | {"devices_used": mesh.size}
        facts = {name: where[name] for name in (*environment.PACKAGES, "platform", "devices")}
        facts["data"] = data._replace(class_names=())
        facts["initial parameters"] = results.params_sha256(initial)
        distributed.check_same({**config.hyperparameters(), **facts})
        warnings += [*_unused_fork(config), *dataset.warnings]
        if config.precision == "bfloat16" and device.platform == "cpu":
            warnings.append("bfloat16 on a CPU is slower than float32; only its accuracy is real")
        warn(callbacks, warnings)
        for callback in callbacks:
            callback.on_data_loaded(dataset)
        run: Any = None  # a RunDir in process 0

        def open_folder() -> tuple[str, dict[str, Any] | None, list[str]]:
            nonlocal run
            if config.fork is not None and load_fork(config.fork) != fork:
                raise UsageError(f"{config.fork} changed while the run started; start it again")
            folder = config.workdir or make_default_folder(data.name, config.model)
            run = stack.enter_context(contextlib.closing(RunDir(folder, config, data)))
            changes = [] if run.result else run.write_environment(where, config.allow_code_change)
            return str(run.folder), run.result, changes

        name, record, changes = distributed.on_primary(open_folder)
        folder = Path(name)
        warn(callbacks, changes)
        if record is None:
            loop = TrainLoop(trainer, run, callbacks, timings, started)
            with catch_signals(loop.signals):
                damaged = loop.restore(*initial)
                warn(callbacks, damaged)
                devices, step = list(mesh.devices.flat), loop.progress.step
                for callback in callbacks:
                    callback.on_train_begin(config, dataset, model, devices, folder, step)
                progress = loop.run()
            problems = [*trainer.warnings, *_learned_nothing(config, data, progress)]
            warn(callbacks, problems)
            warnings += [*changes, *damaged, *problems]
            params = to_host(trainer.eval_params(loop.progress.state))
            model_state = progress.state.model_state
            record = results.record(config, data, progress, params, warnings, devices, where)
            distributed.on_primary(lambda: run.finish(record))
        else:
            params, model_state = _load(folder, config, model, record)
        result = Result(params, model_state, record, folder)
        for callback in callbacks:
            callback.on_train_end(result)
        return result


def _choose_callbacks(
    config: Config, callbacks: Sequence[Callback] | None
) -> tuple[Sequence[Callback], list[str]]:
    """The callbacks of this process, and warnings; see `fit`."""
    warnings: list[str] = []
    if callbacks is None:
        # The only import of `reporting`: a caller of `fit` expects to see the run.
        from mnist_jax.reporting import make_callbacks

        callbacks = make_callbacks(config)
        warnings = enable_compilation_cache(config.compilation_cache)
    if not _overridden(callbacks, "on_warning"):
        callbacks = [*callbacks, PythonWarnings()]
    return callbacks if distributed.is_primary() else [], warnings


def _overridden(callbacks: Sequence[Callback], name: str) -> bool:
    """Whether one of the callbacks has a method of that name of its own."""
    methods = [getattr(getattr(callback, name), "__func__", None) for callback in callbacks]
    return any(method is not getattr(Callback, name) for method in methods)


def _load_data(config: Config, dataset: Dataset | None) -> tuple[Config, Dataset]:
    """The config with the data set's name, and the data set."""
    is_given = dataset is not None
    if dataset is None:
        folders = {"data_dir": config.data_dir, "manual_dir": config.manual_dir}
        dataset = load_dataset(config.dataset, **folders, **config.arguments("dataset"))
    if not dataset.has_its_arrays or dataset.validation is not None:
        problem = f"arrays of the data set {dataset.name} were replaced or held out"
        raise UsageError(f"{problem}; make one of your own with Dataset.from_arrays")
    if config.dataset == "auto" or is_given:
        config = dataclasses.replace(config, dataset=dataset.name)
    if config.validation:
        train, validation = hold_out(dataset.train, config.validation)
        made = train, dataset.test
        dataset = dataclasses.replace(dataset, train=train, validation=validation, made=made)
    size = len(dataset.train.label)
    if config.batch_size is not None and config.batch_size > size:
        raise UsageError(
            f"batch_size is {config.batch_size}; allowed is 1 to {size}, the number of training "
            f"images in {dataset.name}; change --batch_size"
        )
    return config, dataset


def _check_dtype(model: nn.Module, config: Config) -> None:
    """Raises UsageError if --precision=bfloat16 would change nothing."""
    is_own = type(model).__module__ != make_model.__module__  # the package's need no trace for this
    if config.precision == "bfloat16" and is_own:
        traced, _ = trace_training(model, *variable_shapes(model))
        if "bf16[" not in str(traced):
            problem = f"the model {config.model!r} computes nothing in bfloat16"
            raise UsageError(f"{problem}; pass its field dtype to its layers, or use float32")


def _unused_fork(config: Config) -> list[str]:
    """A warning if nothing that the fork adds is part of the run."""
    flags = [] if config.fork is None else added_by(config.fork)
    if not flags or any(getattr(config, flag) == name for flag, name in flags):
        return []
    found = ", ".join(f"--{flag}={name}" for flag, name in flags)
    return [f"the run uses nothing that {config.fork} adds; it adds {found}"]


def _learned_nothing(config: Config, data: DataSpec, progress: Progress) -> list[str]:
    """A warning if a network, trained to the end, answers hardly better than by chance."""
    worst = min(finite_members(progress.rows[-1])["train/accuracy"], default=1.0)
    chance = 1 / data.num_classes
    if config.max_steps is not None or worst >= chance + 0.05 * (1 - chance):
        return []
    problem = f"the train accuracy of a network is {percent(worst)}, hardly above guessing"
    return [f"{problem}; another --learning_rate usually helps"]


def _load(
    folder: Path, config: Config, model: nn.Module, record: dict[str, Any]
) -> tuple[Any, Any]:
    """A complete run's parameters to evaluate and model state, read by process 0 for all."""
    found = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stacked_shapes(config, model))

    def load() -> None:
        nonlocal found
        arrays, _, damaged = load_saved(folder)
        if (step := int(np.max(arrays["state/step"]))) != record["steps"]:
            problem = f"{folder} ended at step {record['steps']}; its checkpoint is of step {step}"
            advice = "restore the newest, or remove result.json and repeat the command"
            causes = [text.rpartition("; ")[0] for text in damaged]  # not "is used instead"
            raise CheckpointError("; ".join([*causes, problem, advice]))
        found = variables_of(arrays, config, model)

    distributed.on_primary(load)
    return distributed.broadcast_arrays(found)


@keep_names()
def _initial(
    config: Config, init_params: Any, model: nn.Module, warnings: list[str]
) -> tuple[Any, Any]:
    """The parameters and model state to start from, stacked by member; None for the model's own.

    Adds to the warnings.
    """
    if init_params is not None:
        initial = to_host(init_params), None
    elif config.init_from is not None:
        other, _ = read_config(config.init_from)
        arrays, _, problems = load_saved(config.init_from)
        warnings += problems
        try:
            initial = variables_of(arrays, other, model)
        except CheckpointError as error:
            problem = f"--init_from={config.init_from} is a run of another network ({error})"
            raise UsageError(f"{problem}; choose a run whose layers have the same sizes") from error
    else:
        return None, None

    def stack(x: np.ndarray, needed: jax.ShapeDtypeStruct) -> np.ndarray:
        x, member = np.asarray(x), needed.shape[config.num_members is not None :]
        if x.shape not in (needed.shape, member):
            raise ValueError(f"an array has shape {x.shape} in place of {member}")
        return np.broadcast_to(x, needed.shape).astype(needed.dtype)

    params, model_state = stacked_shapes(config, model)
    needed = params, None if initial[1] is None else model_state
    try:
        return jax.tree.map(stack, initial, needed)
    except (ValueError, TypeError, AttributeError) as error:
        problem = f"the initial parameters are not those of the model ({first_line(error)})"
        raise UsageError(f"{problem}, or of another number of networks (--seeds)") from error
