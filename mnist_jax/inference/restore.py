"""Saved runs: read back from their folders, and applied to images."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from mnist_jax import steps
from mnist_jax.atomic_io import user_path
from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.errors import CheckpointError, NonFiniteError, UsageError
from mnist_jax.models import IMAGE_SHAPE, MODELS, param_shapes
from mnist_jax.optimizer import EmaState, ema_params
from mnist_jax.parallel import mesh
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import fill, load_newest
from mnist_jax.runs.run_dir import read_config, read_result
from mnist_jax.trainer import EVAL_BATCH_SIZE

CPU_BATCH_SIZE = 50  # small enough for the CNN's activations to stay in a CPU's cache


class LoadedRun(NamedTuple):
    """What a run's folder holds."""

    folder: Path
    config: Config  # resolved
    model: nn.Module  # computes in the run's precision
    members: list[Any]  # parameters to evaluate, NumPy arrays: a tree for each network of the run
    step: int  # updates done
    epoch: int  # completed epochs
    rows: list[dict[str, Any]]  # the lines of metrics.jsonl
    seconds: dict[str, float]  # timings, as in result.json
    warnings: list[str]  # a damaged checkpoint that was skipped; that the run is not complete

    def use_device(self, platform: str | None = None) -> AbstractContextManager[jax.Device]:
        """`mesh.use_device` with the run's precision; platform: None for the run's own."""
        return mesh.use_device(platform or self.config.platform, self.config.precision)


def load_run(folder: str | Path) -> LoadedRun:
    """Reads a run, complete or not; changes nothing in its folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: its config or checkpoints cannot be used.
    """
    folder = user_path(folder)
    config = load_config(folder)
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    found = load_newest(folder / "checkpoints")
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; resume the run, or name another")
    arrays, rest, warnings = found
    members, step = _members(config, model, arrays), int(np.max(arrays["state/step"]))
    if read_result(folder) is None:
        warnings.append(f"{folder} is not complete: it has done {step:,} steps")
    rows, seconds = rest["rows"], rest["seconds"]
    return LoadedRun(folder, config, model, members, step, rest["epoch"], rows, seconds, warnings)


def _members(config: Config, model: nn.Module, arrays: dict[str, np.ndarray]) -> list[Any]:
    """The parameters of each network in a checkpoint, or their EMA; reads no other state."""
    shapes = param_shapes(model)
    if config.seeds is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((config.seeds, *x.shape), x.dtype), shapes
        )
    if config.ema_decay:
        count = next(name for name in arrays if name.endswith("/num_updates"))
        ema = fill(shapes, arrays, count.removesuffix("num_updates") + "ema/")
        state = EmaState(jnp.asarray(arrays[count]), ema)
        params = mesh.to_host(ema_params(None, (state,), config.ema_decay))
    else:
        params = fill(shapes, arrays, "state/params/")
    return [params] if config.seeds is None else [member_of(params, m) for m in range(config.seeds)]


def load_config(folder: str | Path) -> Config:
    """The resolved Config of the run in a folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: config.json is damaged or has another format version.
    """
    config = read_config(user_path(folder))
    if config is None:
        raise UsageError(f"{folder} holds no run; name a folder that train.py made")
    return config


def load_runs(folders: Sequence[str | Path]) -> list[LoadedRun]:
    """Reads runs of one data set; errors are those of `load_run`, and UsageError for other runs."""
    runs = [load_run(folder) for folder in folders]
    names = sorted({run.config.dataset for run in runs})
    if not names:
        raise UsageError("no run is named; name one or more run folders")
    if len(names) > 1:
        raise UsageError(f"the runs are of different data sets ({', '.join(names)})")
    return runs


def dataset_of(
    run: LoadedRun,
    *,
    name: str | None = None,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
) -> Dataset:
    """The data set of a run, or another one by name; errors are those of `load_dataset`."""
    name, data_dir = name or run.config.dataset, data_dir or run.config.data_dir
    return load_dataset(name, data_dir=data_dir, manual_dir=manual_dir)


def logits_fn(run: LoadedRun) -> Callable[[Any, jax.Array], jax.Array]:
    """A pure function: one member's parameters, images (n, 28, 28, 1) uint8 → logits float32."""
    normalize = run.config.normalize

    def logits(params: Any, image: jax.Array) -> jax.Array:
        x = steps.to_input(image, normalize=normalize)
        found: Any = run.model.apply({"params": params}, x, train=False)
        return found.astype(jnp.float32)

    return logits


class Prediction(NamedTuple):
    """The answers of a run's members to images."""

    log_probabilities: np.ndarray  # (members, n, classes) float64
    seeds: list[int]  # of these members
    warnings: list[str]  # members that are excluded because their outputs are not finite

    @property
    def probabilities(self) -> np.ndarray:
        """(members, n, classes) float64."""
        return np.exp(self.log_probabilities)

    @property
    def mean(self) -> np.ndarray:
        """(n, classes) float64: the mean of the members' probabilities."""
        return self.probabilities.mean(0)


class Predictor:
    """A run's members, compiled. Any thread may call it.

    platform: of the device that computes; None for the run's own.
    """

    def __init__(self, run: LoadedRun, platform: str | None = None):
        self._run, self._platform = run, platform
        self._logits = jax.jit(logits_fn(run))

    def __call__(self, images: np.ndarray) -> Prediction:
        """The members' answers to images (n, 28, 28, 1) uint8, n ≥ 1.

        Raises:
            DeviceError: the platform is absent.
            NonFiniteError: the outputs of every member are NaN or infinite.
        """
        run, seeds, found, warnings = self._run, [], [], []
        with run.use_device(self._platform) as device:
            suitable = CPU_BATCH_SIZE if device.platform == "cpu" else EVAL_BATCH_SIZE
            size = min(suitable, len(images))
            padding = -len(images) % size  # one shape, one program
            batches = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
            batches = batches.reshape(-1, size, *IMAGE_SHAPE)
            for seed, params in zip(run.config.all_seeds(), run.members, strict=True):
                params = jax.device_put(params, device)  # one member at a time fits any memory
                logits = jax.device_get([self._logits(params, batch) for batch in batches])
                logits = np.concatenate(logits)[: len(images)].astype(np.float64)
                if np.all(np.isfinite(logits)):
                    seeds.append(seed)
                    found.append(scipy.special.log_softmax(logits, axis=1))
                else:
                    warnings.append(f"seed {seed} of {run.folder} is not finite; it is excluded")
        if not found:
            raise NonFiniteError(f"{'; '.join(warnings)}; no network is left")
        return Prediction(np.stack(found), seeds, warnings)
