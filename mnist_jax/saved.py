"""The model that a run left: read back from its folder, and evaluated."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mnist_jax import steps, storage
from mnist_jax.checkpoint import Checkpoints
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.errors import CheckpointError, MnistJaxError, UsageError
from mnist_jax.metrics import MetricSums
from mnist_jax.models import MODELS
from mnist_jax.programs import EVAL_BATCH_SIZE
from mnist_jax.progress import Progress
from mnist_jax.training import make_optimizer


class SavedRun(NamedTuple):
    """What a run's folder holds.

    Attributes:
        folder: where it is.
        config: what the run is made of.
        model: its network, computing in the precision of the config.
        progress: the newest checkpoint's, its arrays NumPy's.
        notices: a checkpoint that was passed over because it is damaged.
    """

    folder: Path
    config: Config
    model: nn.Module
    progress: Progress
    notices: list[str]

    @property
    def params(self) -> Any:
        """The model's parameters."""
        return self.progress.state.params


def load_run(folder: Path) -> SavedRun:
    """Reads a run back, complete or not; changes nothing in its folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: its checkpoints or its config cannot be used.
    """
    config = load_config(folder)
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    init = partial(steps.init_state, model=model, tx=make_optimizer(config))
    template = Progress(jax.eval_shape(init, jax.random.key(0))).split()[0]
    found = Checkpoints(folder / "checkpoints").load(template)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint; continue the run, or choose another")
    arrays, rest, notices = found
    rest.pop("key", None)
    progress = Progress.join(arrays, rest)
    return SavedRun(folder, config, model, progress, notices)


def load_config(folder: Path) -> Config:
    """The Config of the run in a folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: config.json is not a run's.
    """
    path = folder / "config.json"
    try:
        return Config.from_json(storage.read_json(path))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no run; name a folder that train.py made") from error
    except (OSError, ValueError, MnistJaxError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of a run: {error}") from error


def evaluate(run: SavedRun, split: Split, device: jax.Device) -> MetricSums:
    """The metrics of a saved model on all images of a split, computed as during its training.

    To be called inside `devices.running_on`, which sets the precision of products.
    """
    program = partial(
        steps.eval_steps,
        model=run.model,
        batch_size=EVAL_BATCH_SIZE,
        normalize=run.config.normalize,
    )
    params, split = jax.device_put((run.params, split), device)
    batches = jnp.int32(steps.num_batches(len(split.label), EVAL_BATCH_SIZE))
    sums = jax.jit(program)(params, MetricSums.zeros(), split, jnp.int32(0), batches)
    return jax.device_get(sums)  # here the host waits
