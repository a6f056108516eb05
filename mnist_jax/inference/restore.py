"""Saved runs: read back from their folders, and applied to images."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import lax

from mnist_jax import steps
from mnist_jax.atomic_io import user_path
from mnist_jax.config import Config
from mnist_jax.data import Dataset, Split, load_dataset
from mnist_jax.errors import CheckpointError, NonFiniteError, UsageError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS, param_shapes
from mnist_jax.optimizer import EmaState, ema_params
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.parallel.mesh import make_mesh, put, replicated, to_host
from mnist_jax.runs.checkpoint import fill, load_newest
from mnist_jax.runs.run_dir import read_config, read_result
from mnist_jax.trainer import EVAL_BATCH_SIZE, dynamic_loop_bound, make_eval_steps

CPU_BATCH_SIZE = 50  # small enough for the CNN's activations to stay in a CPU's cache
BATCHES_PER_CALL = 20


class LoadedRun(NamedTuple):
    """What a run's folder holds.

    Attributes:
        folder: of the run.
        config: resolved.
        model: the network, computing in the run's precision.
        members: the parameters to evaluate, NumPy arrays: one tree for each network of the run.
        step: updates done.
        epoch: completed epochs.
        rows: the lines of metrics.jsonl.
        seconds: timings, as in result.json.
        warnings: a damaged checkpoint that was skipped, or that the run is not complete.
    """

    folder: Path
    config: Config
    model: nn.Module
    members: list[Any]
    step: int
    epoch: int
    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    warnings: list[str]


def load_run(folder: str | Path) -> LoadedRun:
    """Reads a run, complete or not; changes nothing in its folder.

    The optimizer's state is not needed, apart from an EMA of the parameters.

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
    shapes = param_shapes(model)
    if config.seeds is not None:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((config.seeds, *x.shape), x.dtype), shapes
        )
    if config.ema_decay:
        names = (re.fullmatch(r"(state/opt_state/.*)ema/.*", name) for name in arrays)
        prefix = next((name[1] for name in names if name), "state/opt_state/")
        state = EmaState(
            jnp.asarray(arrays[prefix + "num_updates"]), fill(shapes, arrays, prefix + "ema/")
        )
        params = to_host(ema_params(None, (state,), config.ema_decay))
    else:
        params = fill(shapes, arrays, "state/params/")
    members = [params]
    if config.seeds is not None:
        members = [member_of(params, member) for member in range(config.seeds)]
    step = int(np.max(arrays["state/step"]))
    if read_result(folder) is None:
        warnings.append(f"{folder} is not complete: it has done {step:,} steps")
    rows, seconds = rest["rows"], rest["seconds"]
    return LoadedRun(folder, config, model, members, step, rest["epoch"], rows, seconds, warnings)


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
    """Reads runs of one data set.

    Raises:
        UsageError: a folder holds no run, or the runs are of different data sets.
        CheckpointError: a run cannot be used.
    """
    runs = [load_run(folder) for folder in folders]
    names = {run.config.dataset for run in runs}
    if len(names) > 1:
        raise UsageError(
            f"the runs are of different data sets ({', '.join(sorted(names))}); name runs of one"
        )
    return runs


def dataset_of(
    run: LoadedRun,
    *,
    name: str | None = None,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
) -> Dataset:
    """The data set of a run, or the one of this name; see `load_dataset`.

    Raises:
        DataError: the data set cannot be loaded.
    """
    name, data_dir = name or run.config.dataset, data_dir or run.config.data_dir
    return load_dataset(name, data_dir=data_dir, manual_dir=manual_dir)


def logits_fn(run: LoadedRun) -> Callable[[Any, jax.Array], jax.Array]:
    """A pure function of one member's parameters and images (n, 28, 28, 1) uint8.

    It returns logits (n, classes) float32.
    """
    normalize = run.config.normalize

    def logits(params: Any, image: jax.Array) -> jax.Array:
        x = steps.to_input(image, normalize=normalize)
        found: Any = run.model.apply({"params": params}, x, train=False)
        return found.astype(jnp.float32)

    return logits


def evaluate_split(run: LoadedRun, split: Split, device: jax.Device) -> Metrics:
    """The metrics of a run on all images of a split, one value for each member if it has seeds.

    The program is that of training, on one device. Call it inside `mesh.use_device`.
    """
    mesh = make_mesh([device], run.config.seeds)
    members = run.config.seeds is not None
    eval_steps = make_eval_steps(
        run.model, mesh, step_config=steps.make_step_config(run.config), members=members
    )
    params = run.members[0]
    if members:
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *run.members)
    count = steps.num_batches(len(split.label), EVAL_BATCH_SIZE)
    args = put((params, Metrics.zeros(run.config.seeds), split, np.int32(0)), replicated(mesh))
    return to_host(eval_steps(*args, np.int32(count) if dynamic_loop_bound(device) else count))


class Prediction(NamedTuple):
    """The answers of a run's members to images.

    Attributes:
        log_probabilities: (members, n, classes) float64.
        seeds: of these members.
        warnings: members that are excluded because their outputs are not finite.
    """

    log_probabilities: np.ndarray
    seeds: list[int]
    warnings: list[str]

    @property
    def probabilities(self) -> np.ndarray:
        """(members, n, classes) float64."""
        return np.exp(self.log_probabilities)

    @property
    def mean(self) -> np.ndarray:
        """(n, classes) float64: the mean of the members' probabilities."""
        return self.probabilities.mean(0)


class Predictor:
    """A run's members on a device, compiled. Make and call it inside `mesh.use_device`.

    Args:
        run: the run.
        device: computes.
        shift: also look at each image shifted by this many pixels in each of eight directions, and
            average the nine probabilities.
        batch_size: images per batch; fewer are padded. None: what suits the device.
    """

    def __init__(
        self,
        run: LoadedRun,
        device: jax.Device,
        *,
        shift: int = 0,
        batch_size: int | None = None,
    ):
        suitable = CPU_BATCH_SIZE if device.platform == "cpu" else EVAL_BATCH_SIZE
        self._run, self._device = run, device
        self._shift, self._batch_size = shift, batch_size or suitable
        logits = logits_fn(run)
        self._logits = jax.jit(lambda params, x: lax.map(partial(logits, params), x))

    def __call__(self, images: np.ndarray) -> Prediction:
        """The members' answers to images (n, 28, 28, 1) uint8, n ≥ 1.

        Raises:
            NonFiniteError: the outputs of every member are NaN or infinite.
        """
        seeds, found, warnings = [], [], []
        for seed, params in zip(self._run.config.all_seeds(), self._run.members, strict=True):
            params = jax.device_put(params, self._device)  # one member at a time fits any memory
            log_probabilities = self._answer(params, images)
            if np.all(np.isfinite(log_probabilities)):
                seeds.append(seed)
                found.append(log_probabilities)
            else:
                warnings.append(f"seed {seed} of {self._run.folder} is not finite; it is excluded")
        if not found:
            raise NonFiniteError(f"{'; '.join(warnings)}; no network is left")
        return Prediction(np.stack(found), seeds, warnings)

    def _answer(self, params: Any, images: np.ndarray) -> np.ndarray:
        """One member's log probabilities, (n, classes) float64."""
        shift, size = self._shift, self._batch_size
        count = min(BATCHES_PER_CALL, steps.num_batches(len(images), size))
        per_call, found = count * size, []
        offsets = (-shift, 0, shift) if shift else (0,)
        for first in range(0, len(images), per_call):
            block = images[first : first + per_call]
            padding = per_call - len(block)  # one shape, one program
            block = np.pad(block, ((0, padding), (shift, shift), (shift, shift), (0, 0)))
            views = []
            for y in offsets:
                for x in offsets:
                    view = block[:, shift - y :, shift - x :][:, :28, :28]
                    logits = self._logits(params, view.reshape(count, size, 28, 28, 1))
                    logits = np.asarray(logits, np.float64).reshape(per_call, -1)  # the host waits
                    views.append(scipy.special.log_softmax(logits, axis=1))
            mean = scipy.special.logsumexp(views, axis=0) - np.log(len(views))
            found.append(mean[: per_call - padding])
        return np.concatenate(found)
