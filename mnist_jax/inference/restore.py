"""The models that runs left: read back from their folders, and evaluated."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_jax import atomic_io as storage
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Dataset, Split, load_dataset
from mnist_jax.errors import CheckpointError, MnistJaxError, NonFiniteError, UsageError
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import MODELS
from mnist_jax.optimizer import ema_params, make_optimizer, step_config
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import CheckpointManager
from mnist_jax.runs.progress import Progress
from mnist_jax.runs.run_dir import read_result
from mnist_jax.trainer import EVAL_BATCH_SIZE, dynamic_loop_bound, make_steps

# Few enough for the CNN's activations to stay in a CPU's cache from layer to layer.
CPU_BATCH_SIZE = 50
BATCHES_PER_CALL = 20  # in one memory: each call asks for its own, unless `memory` keeps it


class LoadedRun(NamedTuple):
    """What a run's folder holds.

    Attributes:
        folder: where it is.
        config: what the run is made of.
        model: its network, computing in the precision of the config.
        progress: the newest checkpoint's, its arrays NumPy's.
        notices: what its reader should know, such as a checkpoint that was passed over because it
            is damaged; whoever works on with the run adds to them.
    """

    folder: Path
    config: Config
    model: nn.Module
    progress: Progress
    notices: list[str]

    @property
    def members(self) -> list[Any]:
        """The parameters that are evaluated: of each member, or of the one network there is."""
        state = self.progress.state
        params = ema_params(state.params, state.opt_state, self.config.ema_decay)
        if self.config.seeds is None:
            return [params]
        return [member_of(params, member) for member in range(self.config.seeds)]


def load_run(folder: Path) -> LoadedRun:
    """Reads a run back, complete or not; changes nothing in its folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: its checkpoints or its config cannot be used.
    """
    config = load_config(folder)
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    init = partial(steps.init_state, model=model, tx=make_optimizer(config, NEVER))
    state = jax.eval_shape(init, jax.random.key(0))
    template = Progress(state).split()[0]
    if config.seeds is not None:  # stacked by member, of whom there may be too many to make one
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((config.seeds, *leaf.shape), leaf.dtype), template
        )
    found = CheckpointManager(folder / "checkpoints").load(template)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint; continue the run, or choose another")
    arrays, rest, notices = found
    rest.pop("key", None)
    progress = Progress.join(arrays, rest)
    return LoadedRun(folder, config, model, progress, notices)


def load_runs(folders: Sequence[Path]) -> list[LoadedRun]:
    """Reads runs of one data set back. One that is not complete gets a notice.

    Raises:
        UsageError: a folder holds no run, or they are of different data sets.
        CheckpointError: a run cannot be used.
    """
    runs = [load_run(folder) for folder in folders]
    names = {run.config.dataset for run in runs}
    if len(names) > 1:
        raise UsageError(
            f"the runs are of different data sets ({', '.join(sorted(names))}); name runs of one"
        )
    for run in runs:
        notice_incomplete(run)
    return runs


def notice_incomplete(run: LoadedRun) -> None:
    """Adds a notice to a run that is not complete.

    Raises:
        CheckpointError: its result is damaged.
    """
    if read_result(run.folder) is None:
        run.notices.append(f"{run.folder} is not complete: it stands at step {run.progress.step:,}")


def dataset_of(
    run: LoadedRun,
    *,
    name: str | None = None,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
) -> Dataset:
    """The data set that a run was trained on, or another in its place.

    Args:
        run: the run.
        name: one of `DATASETS`; None for the run's own.
        data_dir: where it is; None for where the run had its own.
        manual_dir: where its original files are, if it is not there.

    Raises:
        DataError: it cannot be had.
    """
    name, data_dir = name or run.config.dataset, data_dir or run.config.data_dir
    return load_dataset(name, data_dir=data_dir, manual_dir=manual_dir)


def load_config(folder: Path) -> Config:
    """The Config of the run in a folder.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: config.json is not a run's.
    """
    path = folder / "config.json"
    try:
        return Config.from_json(storage.read_json(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder} holds no run; name a folder that train.py made") from error
    except (OSError, ValueError, MnistJaxError, TypeError) as error:
        raise CheckpointError(f"{path} is not the config of a run: {error}") from error


def finite_members(run: LoadedRun, found: np.ndarray) -> tuple[dict[int, np.ndarray], list[str]]:
    """What the members of a run found, (members, ...), by their seeds, and notices.

    A member is left out, with a notice, if any of its numbers is not finite.
    """
    by_seed = dict(zip(run.config.all_seeds(), found, strict=True))
    finite = {seed: values for seed, values in by_seed.items() if np.all(np.isfinite(values))}
    left_out = [
        f"seed {seed} of {run.folder} is not finite; it is left out"
        for seed in by_seed
        if seed not in finite
    ]
    return finite, left_out


def none_left(notices: Sequence[str]) -> NonFiniteError:
    """The error where `finite_members` left out every one."""
    return NonFiniteError(f"{'; '.join(notices)}; no member is left")


def evaluate(run: LoadedRun, split: Split, device: jax.Device) -> Metrics:
    """The metrics of a saved model, or of each member, on all images of a split.

    By the program that a run in its training evaluates with, on one device. To be called inside
    `devices.running_on`, which sets the precision of products.
    """
    programs = make_steps(
        run.model,
        make_optimizer(run.config, NEVER),  # as many steps as any schedule needs
        device,
        train_size=1,
        batch_size=run.config.batch_size,
        recipe=step_config(run.config),
        average=run.config.ema_decay,
        members=run.config.seeds is not None,
    )
    state, split = jax.device_put((run.progress.state, split), device)
    count = steps.num_batches(len(split.label), EVAL_BATCH_SIZE)
    batches = jnp.int32(count) if dynamic_loop_bound(device) else count
    sums = Metrics.zeros(run.config.seeds)
    sums = programs.eval_steps(state, sums, split, jnp.int32(0), batches)
    return jax.device_get(sums)  # here the host waits


def classify(run: LoadedRun, params: Any, image: jax.Array, *, logits: bool = False) -> jax.Array:
    """Images (n, 28, 28, 1) uint8 → probabilities (n, classes) float32, as a pure function.

    Args:
        run: says how images are scaled and what computes the logits.
        params: one member's parameters.
        image: the images.
        logits: return those, before softmax.
    """
    x = steps.to_input(image, normalize=step_config(run.config).normalize)
    found: Any = run.model.apply({"params": params}, x, train=False)
    found = found.astype(jnp.float32)
    return found if logits else jax.nn.softmax(found)


class Classifier:
    """A saved model, or the members of an ensemble, compiled and on a device.

    To be made and called inside `devices.running_on`.

    Args:
        run: the model.
        device: computes.
        shift: also look at each image moved by so many pixels to each of the eight sides, and take
            the mean of all nine probabilities.
        batch_size: images computed at once; fewer are padded. None: what suits the device.
        logits: return these, not the probabilities, of which the smallest vanish in float32.
    """

    def __init__(
        self,
        run: LoadedRun,
        device: jax.Device,
        *,
        shift: int = 0,
        batch_size: int | None = None,
        logits: bool = False,
    ):
        def in_turn(params: Any, batches: jax.Array) -> jax.Array:
            return lax.map(lambda image: classify(run, params, image, logits=logits), batches)

        self._classify = jax.jit(in_turn)
        self._members = run.members
        self._device = device
        suits = CPU_BATCH_SIZE if device.platform == "cpu" else EVAL_BATCH_SIZE
        self._shift, self._batch_size = shift, batch_size or suits

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images (n, 28, 28, 1) uint8, at least one → probabilities (members, n, classes) float32.

        One member where the run is no ensemble.
        """
        shift, size = self._shift, self._batch_size
        count = min(BATCHES_PER_CALL, steps.num_batches(len(images), size))
        many = count * size
        sides = (-shift, 0, shift) if shift else (0,)
        found = []
        for params in self._members:  # one at a time on the device: many need not fit
            params, found_here = jax.device_put(params, self._device), []
            for first in range(0, len(images), many):
                block = images[first : first + many]
                padding = many - len(block)  # one shape, one program
                block = np.pad(block, ((0, padding), *[(shift, shift)] * 2, (0, 0)))
                moved = [
                    block[:, shift - y :, shift - x :][:, :28, :28].reshape(count, size, 28, 28, 1)
                    for y in sides
                    for x in sides
                ]
                mean = sum(self._classify(params, image) for image in moved) / len(moved)
                flat = np.asarray(mean).reshape(many, -1)  # here the host waits
                found_here.append(flat[: many - padding])
            found.append(np.concatenate(found_here))
        return np.stack(found)
