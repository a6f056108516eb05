"""Training and evaluation as pure functions, from one loss to many steps in one compiled call.

`jax.jit` traces everything here. Model, optimizer and step config are keyword arguments, bound
before tracing; arrays are positional.

Every random draw has its own key: `derive_key` folds the root key with the purpose of the draw and
its place (an epoch or a step). So a run can be stopped anywhere and resumed to the same bits, and
the number of steps per call changes nothing.
"""

import dataclasses
from typing import Any, NamedTuple, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from mnist_jax.config import Config
from mnist_jax.data.augment import Augmentation
from mnist_jax.data.split import Split
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import init_params

INIT, SHUFFLE, DROPOUT, AUGMENT = range(4)  # the purpose of a key


class TrainState(NamedTuple):
    """What training changes."""

    step: jax.Array  # int32 scalar, updates done
    params: Any
    opt_state: optax.OptState


class Batch(TypedDict):
    """Examples of one step. The last batch of an epoch is padded to the batch size and masked."""

    image: jax.Array  # (batch, 28, 28, 1) uint8, 0..255
    label: jax.Array  # (batch,) int32, 0..9
    mask: jax.Array  # (batch,) bool, False for padding


def derive_key(root_key: jax.Array, purpose: int, place: jax.Array | int) -> jax.Array:
    """The key for one `purpose` at one `place` (an epoch or a step)."""
    return jax.random.fold_in(jax.random.fold_in(root_key, purpose), place)


def init_state(
    root_key: jax.Array, *, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """Initial parameters and optimizer state, at step 0."""
    params = init_params(model, derive_key(root_key, INIT, 0))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def to_input(image: jax.Array, *, normalize: bool) -> jax.Array:
    """uint8 pixels 0..255 → float32, in 0..1 if `normalize`. Other dtypes pass unchanged."""
    if image.dtype != jnp.uint8:
        return image
    image = image.astype(jnp.float32)
    return image / 255 if normalize else image


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step does besides the model and the optimizer."""

    normalize: bool = True  # scale pixels to 0..1
    augmentation: Augmentation = Augmentation()  # of the training images
    # Fraction of a training label that is spread evenly over all classes (Szegedy et al., 2016,
    # section 7).
    label_smoothing: float = 0.0


def make_step_config(config: Config) -> StepConfig:
    """The StepConfig of a resolved Config."""
    augmentation = Augmentation(config.shift or 0.0, config.rotation or 0.0, config.scale or 0.0)
    return StepConfig(config.normalize, augmentation, config.label_smoothing or 0.0)


def loss_fn(
    params: Any,
    batch: Batch,
    keys: tuple[jax.Array, jax.Array] | None = None,
    *,
    model: nn.Module,
    step_config: StepConfig = StepConfig(),
) -> tuple[jax.Array, Metrics]:
    """Mean softmax cross-entropy over the unmasked rows. Training differentiates this value.

    Args:
        params, batch: the model's parameters and the examples.
        keys: for dropout and for augmentation, when training; None when evaluating.
        model: a module that returns logits (batch, num_classes).
        step_config: what happens to images and labels.

    Returns the loss in nats, a scalar, and the batch's metrics.
    """
    x = to_input(batch["image"], normalize=step_config.normalize)  # (batch, 28, 28, 1)
    if keys is not None and step_config.augmentation:
        x = step_config.augmentation(x, keys[1])
    logits: Any = model.apply(
        {"params": params},
        x,
        train=keys is not None,
        rngs=None if keys is None else {"dropout": keys[0]},
    )  # (batch, num_classes)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask, label = batch["mask"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)  # (batch,)
    if keys is not None and step_config.label_smoothing:
        smoothing = step_config.label_smoothing
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - smoothing) * losses + smoothing * uniform
    loss_sum = jnp.sum(jnp.where(mask, losses, 0))
    count = jnp.sum(mask, dtype=jnp.int32)
    correct = jnp.sum(mask & (jnp.argmax(logits, axis=-1) == label), dtype=jnp.int32)
    metrics = Metrics(loss_sum, correct, count, jnp.full((), NEVER, jnp.int32))
    return loss_sum / jnp.maximum(count, 1), metrics


def train_step(
    state: TrainState,
    batch: Batch,
    root_key: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    step_config: StepConfig = StepConfig(),
) -> tuple[TrainState, Metrics]:
    """One update, and the metrics of its batch before the update.

    `first_nonfinite` of the metrics is this step if the loss or any gradient is NaN or infinite.
    """
    keys = tuple(derive_key(root_key, purpose, state.step) for purpose in (DROPOUT, AUGMENT))
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, batch, keys, model=model, step_config=step_config
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(grads):  # a finite loss can have infinite gradients
        finite &= jnp.all(jnp.isfinite(leaf))
    metrics = dataclasses.replace(metrics, first_nonfinite=jnp.where(finite, NEVER, step))
    return TrainState(step, params, opt_state), metrics


def eval_step(
    params: Any, batch: Batch, *, model: nn.Module, step_config: StepConfig = StepConfig()
) -> Metrics:
    """The metrics of a batch, without dropout and augmentation."""
    return loss_fn(params, batch, model=model, step_config=step_config)[1]


def epoch_permutation(root_key: jax.Array, epoch: jax.Array | int, *, size: int) -> jax.Array:
    """The order of an epoch's `size` examples, (size,) int32.

    Sorts by random 32-bit numbers, at half the cost of `jax.random.permutation`, which sorts again
    to break ties. Among 60,000 numbers, a pair ties in one of three epochs; those two examples
    then keep the order of the data set.
    """
    bits = jax.random.bits(derive_key(root_key, SHUFFLE, epoch), (size,), jnp.uint32)
    return jnp.argsort(bits).astype(jnp.int32)


def num_batches(size: int, batch_size: int) -> int:
    """Batches in an epoch, including the last and smaller one."""
    return -(-size // batch_size)


def take_batch(
    split: Split,
    order: jax.Array | None,
    i: jax.Array | int,
    *,
    batch_size: int,
    sharding: NamedSharding | None = None,
) -> Batch:
    """Batch `i` of a split in this `order` (None: as stored), padded and masked.

    With `sharding` each device gets the same number of rows, which takes more padding if the device
    count does not divide the batch size. Random draws depend on a row's place in the batch, not on
    its device.
    """
    size = split.label.shape[0]
    parts = 1 if sharding is None else sharding.num_devices
    rows = jnp.arange(-(-batch_size // parts) * parts, dtype=jnp.int32)
    place = i * batch_size + rows
    mask = place < size
    if len(rows) > batch_size:
        mask &= rows < batch_size
    place = jnp.minimum(place, size - 1)
    index = place if order is None else order[place]
    batch: Batch = {"image": split.image[index], "label": split.label[index], "mask": mask}
    return batch if parts == 1 else lax.with_sharding_constraint(batch, sharding)


def train_steps(
    state: TrainState,
    metrics: Metrics,
    split: Split,
    order: jax.Array,
    root_key: jax.Array,
    first: jax.Array | int,
    steps: jax.Array | int,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    batch_size: int,
    step_config: StepConfig = StepConfig(),
    sharding: NamedSharding | None = None,
) -> tuple[TrainState, Metrics]:
    """Trains on batches first … first + steps - 1 of an epoch, in one loop on the device.

    With a traced `steps`, one program serves any number of steps. With a Python int the loop has a
    static length, and an accelerator runs it without asking the host after each step.

    Args:
        state: callers donate it; rebind it.
        metrics: the epoch's so far.
        split: the training images and labels, on the device.
        order: (size,) int32, from `epoch_permutation`.
        root_key: the run's key.
        first, steps: int32, index of the first batch within the epoch, and number of batches.
        model, tx, batch_size, step_config: as in `train_step` and `take_batch`.
        sharding: of a batch's rows over several devices; everything else is replicated, and XLA
            sums the gradients over the devices.
    """

    def body(i, carry):
        state, metrics = carry
        batch = take_batch(split, order, first + i, batch_size=batch_size, sharding=sharding)
        state, step_metrics = train_step(
            state, batch, root_key, model=model, tx=tx, step_config=step_config
        )
        return state, metrics.merge(step_metrics)

    return lax.fori_loop(0, steps, body, (state, metrics))


def eval_steps(
    params: Any,
    metrics: Metrics,
    split: Split,
    first: jax.Array | int,
    steps: jax.Array | int,
    *,
    model: nn.Module,
    batch_size: int,
    step_config: StepConfig = StepConfig(),
    sharding: NamedSharding | None = None,
) -> Metrics:
    """Adds the metrics of batches first … first + steps - 1 of a split, as stored, to `metrics`."""

    def body(i, metrics):
        batch = take_batch(split, None, first + i, batch_size=batch_size, sharding=sharding)
        return metrics.merge(eval_step(params, batch, model=model, step_config=step_config))

    return lax.fori_loop(0, steps, body, metrics)
