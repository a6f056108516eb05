"""Training and evaluation as pure functions, from one loss to many steps in one compiled call.

Everything here is traced by `jax.jit`: no state is hidden, nothing touches the host. The model and
the optimizer are closed over through keyword arguments; arrays go in and come out.

Randomness is addressed, never threaded: the key of any draw is folded from the root key, the
draw's purpose and its place (an epoch or a step), so a run can be cut anywhere and continued, and
the number of steps in a call changes nothing.
"""

import dataclasses
from typing import Any, NamedTuple, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding

from mnist_jax.data.augment import Augmentation
from mnist_jax.data.split import Split
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.microbatches import tree_sum
from mnist_jax.models import init_params

INIT, SHUFFLE, DROPOUT, AUGMENT = range(4)  # what a key is for


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
        step: int32 scalar, updates completed.
        params: the model's parameters.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def step_of(state: TrainState) -> int:
    """Updates completed; by each member of an ensemble. Reads the device."""
    step = state.step
    if isinstance(step, jax.Array) and not step.is_fully_addressable:
        step = step.addressable_data(0)  # all members are equally far
    return int(np.max(step))


class Batch(TypedDict):
    """Examples for one step; the last batch of an epoch is padded to size and masked."""

    image: jax.Array  # (batch, 28, 28, 1) uint8, 0..255
    label: jax.Array  # (batch,) int32, 0..9
    mask: jax.Array  # (batch,) bool, False where the row is padding


def derive_key(root_key: jax.Array, purpose: int, place: jax.Array | int) -> jax.Array:
    """The key for one `purpose` at one `place` (an epoch or a step)."""
    return jax.random.fold_in(jax.random.fold_in(root_key, purpose), place)


def init_state(
    root_key: jax.Array, *, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """Fresh parameters and optimizer, at step 0."""
    params = init_params(model, derive_key(root_key, INIT, 0))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def to_input(image: jax.Array, *, normalize: bool) -> jax.Array:
    """uint8 pixels 0..255 → float32, 0..1 if `normalize`. Other dtypes pass as they are."""
    if image.dtype != jnp.uint8:
        return image
    image = image.astype(jnp.float32)
    return image / 255 if normalize else image


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step does besides the model and the optimizer.

    Attributes:
        normalize: pixels to 0..1.
        augmentation: distorts the training images.
        label_smoothing: the share of a training label that is spread evenly over all classes
            (Szegedy et al., 2016, section 7).
        microbatches: equal parts of the batch whose gradients are computed one after the other and
            summed in one order, whatever the number of devices; a power of two.
    """

    normalize: bool = True
    augmentation: Augmentation = Augmentation()
    label_smoothing: float = 0.0
    microbatches: int = 1


def loss_fn(
    params: Any,
    batch: Batch,
    keys: tuple[jax.Array, jax.Array] | None = None,
    *,
    model: nn.Module,
    recipe: StepConfig = StepConfig(),
) -> tuple[jax.Array, Metrics]:
    """Mean softmax cross-entropy over the batch's real rows, and the sums behind it.

    Args:
        params: the model's parameters.
        batch: the examples.
        keys: for dropout and for augmentation: with them the model trains, without it evaluates.
        model: a module returning logits (batch, num_classes).
        recipe: what happens to images and labels.
    """
    x = to_input(batch["image"], normalize=recipe.normalize)
    if keys is not None and recipe.augmentation:
        x = recipe.augmentation(x, keys[1])
    logits: Any = model.apply(
        {"params": params},
        x,
        train=keys is not None,
        rngs=None if keys is None else {"dropout": keys[0]},
    )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask, label = batch["mask"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    if keys is not None and recipe.label_smoothing:
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - recipe.label_smoothing) * losses + recipe.label_smoothing * uniform
    loss_sum = jnp.sum(jnp.where(mask, losses, 0))
    count = jnp.sum(mask, dtype=jnp.int32)
    correct = jnp.sum(mask & (jnp.argmax(logits, axis=-1) == label), dtype=jnp.int32)
    sums = Metrics(loss_sum, correct, count, jnp.full((), NEVER, jnp.int32))
    return loss_sum / jnp.maximum(count, 1), sums


def train_step(
    state: TrainState,
    batch: Batch,
    root_key: jax.Array,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    recipe: StepConfig = StepConfig(),
    spread: NamedSharding | None = None,
) -> tuple[TrainState, Metrics]:
    """One update, and the metrics of its batch from before the update.

    Microbatches divide the rows of the batch, and devices divide the microbatches. The metrics name
    this step as not finite if the loss, or any gradient, is NaN or infinite.
    """
    keys = tuple(derive_key(root_key, purpose, state.step) for purpose in (DROPOUT, AUGMENT))
    if recipe.microbatches == 1:
        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, keys, model=model, recipe=recipe
        )
    else:
        loss, sums, grads = _in_microbatches(
            state.params, batch, keys, model=model, recipe=recipe, spread=spread
        )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    finite = jnp.isfinite(loss)
    for leaf in jax.tree.leaves(grads):  # infinite ones can come of a finite loss
        finite &= jnp.all(jnp.isfinite(leaf))
    sums = dataclasses.replace(sums, first_nonfinite=jnp.where(finite, NEVER, step))
    return TrainState(step, params, opt_state), sums


def _in_microbatches(params, batch, keys, *, model, recipe, spread):
    """Mean loss, sums and gradient as of `loss_fn`, but for the draws: each part has its own."""

    def of_part(shared, part, number):
        params, (dropout, augment), count = shared
        keys = jax.random.fold_in(dropout, number), jax.random.fold_in(augment, number)

        def loss_share(params):
            sums = loss_fn(params, part, keys, model=model, recipe=recipe)[1]
            return sums.loss_sum / count, (sums.loss_sum, sums.correct)

        return jax.grad(loss_share, has_aux=True)(params)

    count = jnp.sum(batch["mask"], dtype=jnp.int32)
    parts = jax.tree.map(lambda x: x.reshape(recipe.microbatches, -1, *x.shape[1:]), batch)
    shared = params, keys, jnp.maximum(count, 1)
    mesh = None if spread is None else spread.mesh
    grads, (loss_sum, correct) = tree_sum(of_part, shared, parts, mesh)
    sums = Metrics(loss_sum, correct, count, jnp.full((), NEVER, jnp.int32))
    return loss_sum / shared[2], sums, grads


def eval_step(
    params: Any, batch: Batch, *, model: nn.Module, recipe: StepConfig = StepConfig()
) -> Metrics:
    """The metrics of a batch, with dropout off and the images as they are."""
    return loss_fn(params, batch, model=model, recipe=recipe)[1]


def epoch_permutation(root_key: jax.Array, epoch: jax.Array | int, *, size: int) -> jax.Array:
    """The order in which an epoch visits a split of `size` examples, (size,) int32.

    Sorting by random 32-bit numbers: half the cost of `jax.random.permutation`, which repeats the
    sort to break ties at random. Of 60,000 numbers a pair ties in one epoch of three; the
    two examples then keep the order of the file.
    """
    bits = jax.random.bits(derive_key(root_key, SHUFFLE, epoch), (size,), jnp.uint32)
    return jnp.argsort(bits).astype(jnp.int32)


def num_batches(size: int, batch_size: int) -> int:
    """Batches in an epoch, the last and smaller one included."""
    return -(-size // batch_size)


def take_batch(
    split: Split,
    order: jax.Array | None,
    i: jax.Array | int,
    *,
    batch_size: int,
    microbatches: int = 1,
    spread: NamedSharding | None = None,
) -> Batch:
    """Batch `i` of `split` in the given `order` (None: as it stands), padded and masked.

    With `spread` its rows lie on many devices, as many on each, which takes more padding where
    they do not divide; so do microbatches. What is drawn for a row depends on its place in the
    batch, not on where it lies or on the rows behind it.
    """
    size = split.label.shape[0]
    parts = max(microbatches, 1 if spread is None else spread.num_devices)
    rows = jnp.arange(-(-batch_size // parts) * parts, dtype=jnp.int32)
    place = i * batch_size + rows
    mask = place < size
    if len(rows) > batch_size:
        mask &= rows < batch_size
    place = jnp.minimum(place, size - 1)
    index = place if order is None else order[place]
    batch: Batch = {"image": split.image[index], "label": split.label[index], "mask": mask}
    return batch if spread is None else lax.with_sharding_constraint(batch, spread)


def train_steps(
    state: TrainState,
    sums: Metrics,
    split: Split,
    order: jax.Array,
    root_key: jax.Array,
    first: jax.Array | int,
    steps: jax.Array | int,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    batch_size: int,
    recipe: StepConfig = StepConfig(),
    spread: NamedSharding | None = None,
) -> tuple[TrainState, Metrics]:
    """Batches first … first + steps - 1 of an epoch in one loop on the device.

    A traced `steps` makes one program for any number of steps. A Python int makes a loop of known
    length, which an accelerator runs without asking the host after each step.

    Args:
        state: donated by the callers; rebind it.
        sums: the epoch's metrics so far.
        split: the training images and labels, on the device.
        order: the epoch's order, (size,) int32, from `epoch_permutation`.
        root_key: the run's key.
        first: int32, the place of the first batch in the epoch.
        steps: int32, how many batches.
        model: a module returning logits.
        tx: the optimizer.
        batch_size: examples a step.
        recipe: what happens to images and labels.
        spread: over which devices the rows of a batch lie, if over several; everything else is
            whole on each. The gradients are then summed over the devices, without microbatches by
            the compiler.
    """

    def body(i, carry):
        state, sums = carry
        batch = take_batch(
            split,
            order,
            first + i,
            batch_size=batch_size,
            microbatches=recipe.microbatches,
            spread=spread,
        )
        state, step_sums = train_step(
            state, batch, root_key, model=model, tx=tx, recipe=recipe, spread=spread
        )
        return state, sums.merge(step_sums)

    return lax.fori_loop(0, steps, body, (state, sums))


def eval_steps(
    params: Any,
    sums: Metrics,
    split: Split,
    first: jax.Array | int,
    steps: jax.Array | int,
    *,
    model: nn.Module,
    batch_size: int,
    recipe: StepConfig = StepConfig(),
    spread: NamedSharding | None = None,
) -> Metrics:
    """Adds the metrics of batches first … first + steps - 1 of a split to `sums`.

    Args: as for `train_steps`; the batches are those of the split as it stands.
    """

    def body(i, sums):
        batch = take_batch(split, None, first + i, batch_size=batch_size, spread=spread)
        return sums.merge(eval_step(params, batch, model=model, recipe=recipe))

    return lax.fori_loop(0, steps, body, sums)
