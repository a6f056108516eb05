"""Training and evaluation as pure functions, from one loss to many steps in one compiled call.

`jax.jit` traces everything here. Model, optimizer and step config are keyword arguments, bound
before tracing; arrays are positional.

Every random draw has its own key: `derive_key` folds the purpose of the draw and its place (an
epoch or a step) into the root key. So a run can be stopped anywhere and resumed to the same bits,
and the number of steps per call changes nothing.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from mnist_jax.config import Config
from mnist_jax.data.augment import AUGMENTATIONS, Distortion
from mnist_jax.data.batches import Batch, batch_index, gather_batch
from mnist_jax.data.dataset import Split
from mnist_jax.errors import UsageError
from mnist_jax.losses import LOSSES, cross_entropy
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import forward, init_variables

INIT, SHUFFLE, DROPOUT, DISTORT, AUGMENT = range(5)  # the purpose of a key


class TrainState(NamedTuple):
    """The state of training."""

    step: jax.Array  # int32 scalar, updates done
    params: Any
    model_state: Any  # the model's other collections, such as {"batch_stats": …}; often empty
    opt_state: optax.OptState
    ema: Any  # the sum behind the EMA of the parameters, a tree like them; None without an EMA


def derive_key(root_key: jax.Array, purpose: int, place: jax.Array | int) -> jax.Array:
    """The key for one `purpose` at one `place` (an epoch or a step)."""
    return jax.random.fold_in(jax.random.fold_in(root_key, purpose), place)


class StepKeys(NamedTuple):
    """The keys of one step."""

    dropout: jax.Array
    distort: jax.Array
    augment: jax.Array


def step_keys(root_key: jax.Array, step: jax.Array | int) -> StepKeys:
    """The keys of the step after `step` updates."""
    return StepKeys(*(derive_key(root_key, p, step) for p in (DROPOUT, DISTORT, AUGMENT)))


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Options of a step besides the model and the optimizer."""

    normalize: bool = True  # scale pixels to 0..1
    distortion: Distortion = Distortion()  # of the training images
    augmentation: Callable[[Batch, jax.Array], Batch] | None = None  # after that; (batch, key)
    # (logits, batch) → (batch,) float32; training minimises its mean.
    loss: Callable[[jax.Array, Batch], jax.Array] = cross_entropy
    ema_decay: float = 0.0  # 0: no EMA


def make_step_config(config: Config) -> StepConfig:
    """The StepConfig of a resolved Config."""
    augmentation = None
    if config.augmentation is not None:
        options = config.arguments("augmentation")
        augmentation = partial(AUGMENTATIONS[config.augmentation], **options)
    return StepConfig(
        config.normalize,
        Distortion(config.shift or 0.0, config.rotation or 0.0, config.scale or 0.0),
        augmentation,
        partial(LOSSES[config.loss or "cross_entropy"], **config.arguments("loss")),
        config.ema_decay or 0.0,
    )


def init_state(
    root_key: jax.Array,
    params: Any = None,
    model_state: Any = None,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    step_config: StepConfig = StepConfig(),
) -> TrainState:
    """The state at step 0, from these parameters and model state, or else the model's own."""
    initial = init_variables(model, derive_key(root_key, INIT, 0))
    params = initial[0] if params is None else params
    model_state = initial[1] if model_state is None else model_state
    ema = jax.tree.map(jnp.zeros_like, params) if step_config.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params), ema)


def to_input(image: jax.Array, *, normalize: bool) -> jax.Array:
    """uint8 pixels 0..255 → float32, in 0..1 if `normalize`. Floats pass; UsageError for others."""
    if jnp.issubdtype(image.dtype, jnp.floating):
        return image
    if image.dtype != jnp.uint8:
        raise UsageError(f"the images are {image.dtype}; allowed are uint8 and floats")
    image = image.astype(jnp.float32)
    return image / 255 if normalize else image


def train_input(batch: Batch, keys: StepKeys, config: StepConfig) -> Batch:
    """The batch as the network trains on it: float32 images, distorted and augmented."""
    image = to_input(batch["image"], normalize=config.normalize)
    if config.distortion:
        image = config.distortion(image, keys.distort)
    batch = {**batch, "image": image}
    if config.augmentation is None:
        return batch
    new = config.augmentation(batch, keys.augment)
    if not isinstance(new, dict) or not batch.keys() <= new.keys():
        raise UsageError("the augmentation returns no batch; a batch has image, label and mask")
    for name in ("image", "mask"):  # a label may become a distribution
        if (new[name].shape, new[name].dtype) != (batch[name].shape, batch[name].dtype):
            raise UsageError(f"the augmentation changes the shape or the dtype of the {name}")
    return new


def loss_fn(
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    *,
    model: nn.Module,
    step_config: StepConfig = StepConfig(),
) -> tuple[jax.Array, tuple[Metrics, Any]]:
    """What training differentiates: the mean loss over the unmasked rows, plus sown losses.

    `batch` comes from `train_input`; `key` is for dropout. Returns the scalar, and with it the
    batch's metrics and the new model state.
    """
    mask, label = batch["mask"], batch["label"]
    logits, model_state, sown = forward(
        model, params, model_state, batch["image"], train=True, mask=mask, key=key
    )
    losses = step_config.loss(logits, batch)
    if not isinstance(losses, jax.Array):
        raise UsageError(f"the loss is a {type(losses).__name__}, no array {mask.shape}")
    if losses.shape != mask.shape or not jnp.issubdtype(losses.dtype, jnp.floating):
        found = f"{losses.dtype.name}{list(losses.shape)}"
        raise UsageError(f"the loss is {found}; it has a float for each example, {mask.shape}")
    loss, metrics = _metrics(logits, label, mask, losses)
    return loss + sown, (metrics, model_state)


def _metrics(
    logits: jax.Array, label: jax.Array, mask: jax.Array, losses: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The mean of the losses, and the metrics of a batch."""
    loss_sum = jnp.sum(jnp.where(mask, losses, 0))
    count = jnp.sum(mask, dtype=jnp.int32)
    label = jnp.argmax(label, axis=-1) if label.ndim == logits.ndim else label
    correct = jnp.sum(mask & (jnp.argmax(logits, axis=-1) == label), dtype=jnp.int32)
    metrics = Metrics(loss_sum, correct, count, jnp.full((), NEVER, jnp.int32))
    return loss_sum / jnp.maximum(count, 1), metrics


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of the leaves are finite: 0 times a non-finite number is NaN."""
    # A CPU multiplies by a vector of zeros in half of the time in which it reduces truth values.
    leaves = map(jnp.atleast_1d, jax.tree.leaves(tree))
    return jnp.isfinite(sum(jnp.sum(leaf @ jnp.zeros(leaf.shape[-1])) for leaf in leaves))


def train_step(
    state: TrainState,
    batch: Batch,
    keys: StepKeys,
    cast_params: Any = None,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    step_config: StepConfig = StepConfig(),
    finite: Callable[[Any], jax.Array] = all_finite,
) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
    """One update; the metrics of its batch before the update; and its loss and gradient norm.

    `first_nonfinite` of the metrics is this step if the loss or any gradient is NaN or infinite.
    An optimizer that takes it (`optax.GradientTransformationExtraArgs`) is called with `grad_fn`, a
    function from parameters to gradients on this batch.

    Args:
        batch: as stored.
        keys: from `step_keys`.
        cast_params: the state's parameters, some in the precision that the model casts them to.
        finite: tells whether the numbers of a tree are finite; `first_nonfinite` has its shape.
    """
    batch = train_input(batch, keys, step_config)

    def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        how = {"model": model, "step_config": step_config}
        return loss_fn(params, state.model_state, batch, keys.dropout, **how)

    def grad_fn(params: Any, *_: Any) -> Any:
        return jax.grad(objective, has_aux=True)(params)[0]

    (loss, (metrics, model_state)), grads = jax.value_and_grad(objective, has_aux=True)(
        state.params if cast_params is None else cast_params
    )
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
    # Not `value` and others, which some optimizers want: optax's SAM refuses them.
    updates, opt_state = optax.with_extra_args_support(tx).update(
        grads, state.opt_state, state.params, grad_fn=grad_fn
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if step_config.ema_decay:  # without bias correction, which `ema_params` makes
        ema = optax.incremental_update(params, ema, 1 - step_config.ema_decay)
    step = state.step + 1
    # A finite loss can have infinite gradients.
    nonfinite = jnp.where(finite((loss, grads)), NEVER, step)
    metrics = dataclasses.replace(metrics, first_nonfinite=nonfinite)
    values = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(step, params, model_state, opt_state, ema), metrics, values


def eval_step(
    params: Any,
    model_state: Any,
    batch: Batch,
    *,
    model: nn.Module,
    step_config: StepConfig = StepConfig(),
) -> Metrics:
    """Cross-entropy in nats and accuracy of a batch, without dropout and augmentation."""
    x = to_input(batch["image"], normalize=step_config.normalize)
    logits = forward(model, params, model_state, x, mask=batch["mask"])[0]
    return _metrics(logits, batch["label"], batch["mask"], cross_entropy(logits, batch))[1]


def epoch_permutation(root_key: jax.Array, epoch: jax.Array | int, *, size: int) -> jax.Array:
    """The order of an epoch's `size` examples, (size,) int32.

    Sorts by random 32-bit numbers, at half the cost of `jax.random.permutation`, which sorts again
    to break ties. Among 60,000 numbers, a pair ties in one of three epochs; those two examples
    then keep the order of the data set.
    """
    bits = jax.random.bits(derive_key(root_key, SHUFFLE, epoch), (size,), jnp.uint32)
    return jnp.argsort(bits).astype(jnp.int32)


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
    log_size: int = 0,
) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
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
        sharding: of a batch's rows over several devices; everything else is replicated, and XLA
            sums the gradients over the devices.
        log_size: 0, or at least `steps`.

    Returns the new state, the metrics, and each step's loss and gradient norm, (log_size,) float32;
    empty if `log_size` is 0.
    """
    size = len(split.label)

    def body(i, carry):
        state, metrics, log = carry
        rows = batch_index(size, order, first + i, batch_size=batch_size, sharding=sharding)
        batch = gather_batch(split, *rows, sharding=sharding)
        keys = step_keys(root_key, state.step)
        state, step_metrics, values = train_step(
            state, batch, keys, model=model, tx=tx, step_config=step_config
        )
        log = {name: log[name].at[i].set(values[name]) for name in log}
        return state, metrics.merge(step_metrics), log

    log = {name: jnp.zeros(log_size) for name in ("loss", "grad_norm") if log_size}
    return lax.fori_loop(0, steps, body, (state, metrics, log))


def eval_steps(
    params: Any,
    model_state: Any,
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
    size = len(split.label)

    def body(i, metrics):
        rows = batch_index(size, None, first + i, batch_size=batch_size, sharding=sharding)
        batch = gather_batch(split, *rows, sharding=sharding)
        found = eval_step(params, model_state, batch, model=model, step_config=step_config)
        return metrics.merge(found)

    return lax.fori_loop(0, steps, body, metrics)
