"""Training and evaluation as pure functions: one step, the batches of an epoch, many steps."""

import functools
import itertools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import make_split

from mnist_jax import Config, models, steps
from mnist_jax.data.augment import Distortion
from mnist_jax.data.batches import Batch, num_batches
from mnist_jax.data.dataset import Split
from mnist_jax.losses import cross_entropy
from mnist_jax.metrics import Metrics
from mnist_jax.optimizer import ema_params

ROOT = jax.random.key(0)
TX, SGD = optax.adam(1e-3), optax.sgd(1.0)
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
SIZE, BATCH_SIZE = 10, 4  # an epoch has batches of 4, 4 and 2
ORDER = steps.epoch_permutation(ROOT, 0, size=SIZE)
LOGISTIC = models.LogisticRegression()
MLP = models.MLP(hidden_sizes=(32, 16))
DROPOUT = models.MLP(hidden_sizes=(32, 16), dropout=0.5)
SPLIT = make_split(SIZE, seed=0)


def make_batch(split: Split, index=slice(None)) -> Batch:
    label = split.label[index]
    return {"image": split.image[index], "label": label, "mask": np.ones(len(label), bool)}


@functools.cache
def initial(model: nn.Module, tx: optax.GradientTransformation = TX) -> steps.TrainState:
    return jit(partial(steps.init_state, model=model, tx=tx))(ROOT)


def loss_of(params: Any, batch: Batch, key: jax.Array = ROOT, **options: Any) -> Any:
    """`loss_fn` of a model without state on a batch of pixels: the loss and the metrics."""
    batch = steps.train_input(batch, steps.step_keys(ROOT, 0), steps.StepConfig())
    loss, (metrics, _) = steps.loss_fn(params, {}, batch, key, **options)
    return loss, metrics


def train_step(state: steps.TrainState, batch: Batch, root_key: jax.Array, **how: Any) -> Any:
    return steps.train_step(state, batch, steps.step_keys(root_key, state.step), **how)


@functools.cache
def value_and_grad(model: nn.Module) -> Any:
    return jit(jax.value_and_grad(partial(loss_of, model=model), has_aux=True))


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    check = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(check, jax.device_get(ours), jax.device_get(theirs))


def test_training_images_are_distorted_as_the_config_says():
    amounts, keys = {"shift": 2.0, "rotation": 15.0, "scale": 0.1}, steps.step_keys(ROOT, 5)
    step_config = steps.make_step_config(Config(normalize=False, **amounts).resolve())
    found = steps.train_input(make_batch(SPLIT), keys, step_config)["image"]
    assert_close(found, Distortion(**amounts)(SPLIT.image.astype(np.float32), keys.distort))


def test_labels_are_smoothed_in_training_only_and_the_returned_loss_is_differentiated():
    params, batch = initial(LOGISTIC).params, make_batch(SPLIT)
    step_config = steps.StepConfig(loss=partial(cross_entropy, label_smoothing=0.3))
    options: Any = {"model": LOGISTIC, "step_config": step_config}
    target = optax.smooth_labels(jax.nn.one_hot(batch["label"], 10), 0.3)

    def smoothed(params):
        logits = LOGISTIC.apply({"params": params}, batch["image"] / np.float32(255))
        return optax.softmax_cross_entropy(logits, target).mean()

    np.testing.assert_allclose(loss_of(params, batch, **options)[0], smoothed(params), rtol=1e-5)
    evaluated = steps.eval_step(params, {}, batch, **options)
    soft = loss_of(params, {**batch, "label": target}, model=LOGISTIC)[0]  # a distribution each
    np.testing.assert_allclose(soft, smoothed(params), rtol=1e-5)
    assert_equal(evaluated, loss_of(params, batch, model=LOGISTIC)[1])
    state, _, values = train_step(initial(LOGISTIC, SGD), batch, ROOT, tx=SGD, **options)
    moved = jax.tree.map(jnp.subtract, params, state.params)
    assert_close(moved, jax.grad(smoothed)(params))
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(moved)))
    assert_close(values, {"loss": smoothed(params), "grad_norm": norm})


def test_in_bfloat16_the_loss_and_the_gradients_are_float32():
    batch, params, losses = make_batch(SPLIT), initial(MLP).params, {}
    for dtype in (jnp.bfloat16, None):
        model = MLP.clone(dtype=dtype)
        (loss, metrics), grads = value_and_grad(model)(params, batch)
        found = {a.dtype for a in (loss, metrics.loss_sum, *jax.tree.leaves(grads))}
        assert found == {jnp.dtype("float32")}
        losses[dtype] = float(loss)
    assert losses[jnp.bfloat16] != losses[None]
    assert losses[jnp.bfloat16] == pytest.approx(losses[None], rel=0.01)


def test_padding_never_counts_whatever_and_wherever_it_is():
    split, garbage, params = make_split(5, 0), make_split(3, 9), initial(MLP).params
    padded = {
        "image": np.concatenate([split.image, garbage.image]),
        "label": np.concatenate([split.label, garbage.label]),
        "mask": np.arange(8) < 5,
    }
    expected = value_and_grad(MLP)(params, make_batch(split))
    found = value_and_grad(MLP)(params, padded)
    assert found[0][1].count == 5
    assert_close(found, expected)
    other = {name: np.where(np.arange(8) < 5, x.T, 3).T for name, x in padded.items()}
    other["image"], other["mask"] = other["image"].astype(np.uint8), padded["mask"]
    assert_equal(value_and_grad(MLP)(params, other), found)
    reversed_ = {name: value[::-1] for name, value in padded.items()}
    assert_close(value_and_grad(MLP)(params, reversed_), expected)
    nothing = value_and_grad(MLP)(params, {**padded, "mask": np.zeros(8, bool)})
    assert_equal(nothing, ((np.float32(0), Metrics.zeros()), jax.tree.map(np.zeros_like, params)))


def test_three_steps_equal_adam_by_hand():
    """The gradient of logistic regression and Adam (Kingma and Ba, 2015), in NumPy and float64."""
    learning_rate, b1, b2, epsilon = 0.01, 0.9, 0.999, 1e-7
    tx = optax.adam(learning_rate, eps=epsilon)
    x, target = SPLIT.image.reshape(SIZE, -1) / 255.0, np.eye(10)[SPLIT.label]
    w = np.random.default_rng(0).normal(0, 0.01, (785, 10))  # the last row is the bias
    x, m, v = np.c_[x, np.ones(SIZE)], np.zeros_like(w), np.zeros_like(w)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params = {"logits": {"kernel": jnp.asarray(w[:-1]), "bias": jnp.asarray(w[-1])}}
        state = steps.TrainState(jnp.int32(0), params, {}, tx.init(params), None)
        batch: Any = {**make_batch(SPLIT), "image": SPLIT.image / 255.0}
        step = jit(partial(train_step, model=LOGISTIC, tx=tx))
        for t in range(1, 4):
            state, *_ = step(state, batch, ROOT)
            exp = np.exp(x @ w)
            g = x.T @ (exp / exp.sum(1, keepdims=True) - target) / SIZE
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            w = w - learning_rate * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + epsilon)
            found = np.r_[state.params["logits"]["kernel"], state.params["logits"]["bias"][None]]
            np.testing.assert_allclose(found, w, rtol=0, atol=1e-9 * learning_rate)
    assert state.step == 3


class Normed(models.LogisticRegression):
    """Has batch statistics, and adds the mean of its scaled pixels to the loss."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, mask: Any = None) -> jax.Array:
        rows = None if mask is None else mask[:, None]
        x = nn.BatchNorm(not train, momentum=0.5)(x.reshape(len(x), -1), mask=rows)
        self.sow("losses", "mean", self.param("scale", nn.initializers.ones, ()) * 3.0)
        others = 0.0 if train else x.mean(0, where=rows)[:10]
        return nn.Dense(10, kernel_init=nn.initializers.zeros)(x) + others


def test_a_model_has_a_state_and_losses_of_its_own_and_padding_is_not_in_them():
    split, start = make_split(5, 0), initial(Normed(), SGD)
    index, mask = np.array([0, 1, 2, 3, 4, 0, 0, 0]), np.arange(8) < 5
    step = jit(partial(train_step, model=Normed(), tx=SGD))
    state, metrics, values = step(start, make_batch(split), ROOT)
    assert values["loss"] == pytest.approx(np.log(10) + 3, rel=1e-6)
    assert metrics.loss == pytest.approx(np.log(10), rel=1e-6)
    assert state.params["scale"] == 1 - 3
    (statistics,) = state.model_state["batch_stats"].values()
    mean = split.image.reshape(5, -1).mean(0) / 255
    assert_close(statistics["mean"], 0.5 * mean)  # half of the way from 0
    padded: Batch = {**make_batch(split, index), "mask": mask}
    assert_close(step(start, padded, ROOT), (state, metrics, values))
    evaluate = partial(steps.eval_step, start.params, state.model_state, model=Normed())
    assert_close(evaluate(padded), evaluate(make_batch(split)))


def test_an_optimizer_may_call_for_the_gradient_elsewhere():
    """With `grad_fn`, as in sharpness-aware minimisation (Foret et al., 2021)."""

    def update(grads, state, params, *, grad_fn):
        above = jax.tree.map(lambda p, g: p + g / 2, params, grads)
        return jax.tree.map(jnp.negative, grad_fn(above)), state

    tx = optax.GradientTransformationExtraArgs(SGD.init, update)
    start, batch = initial(LOGISTIC, tx), make_batch(SPLIT)
    state, *_ = train_step(start, batch, ROOT, model=LOGISTIC, tx=tx)
    grads = value_and_grad(LOGISTIC)(start.params, batch)[1]
    above = jax.tree.map(lambda p, g: p + g / 2, start.params, grads)
    there = value_and_grad(LOGISTIC)(above, batch)[1]
    assert_close(state.params, jax.tree.map(jnp.subtract, start.params, there))


def test_keys_differ_by_root_purpose_and_place():
    purposes = steps.INIT, steps.SHUFFLE, steps.DROPOUT, steps.DISTORT, steps.AUGMENT
    places = itertools.product(map(jax.random.key, (0, 1)), purposes, range(4))
    keys = list(itertools.starmap(steps.derive_key, places))
    keys += steps.step_keys(jax.random.key(2), 0)  # three
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 43


def test_the_order_of_an_epoch_is_determined_by_epoch_and_seed():
    def orders():
        keys = [jax.random.key(seed, impl="threefry2x32") for seed in (0, 1)]
        return [steps.epoch_permutation(k, e, size=100).tolist() for k in keys for e in range(3)]

    found = orders()
    assert all(sorted(order) == list(range(100)) for order in found)
    assert len({tuple(order) for order in [*found, range(100)]}) == 7
    with jax.enable_x64(True):
        assert orders() == found


def test_dropout_is_determined_by_the_step_and_the_root_key():
    batch, start = make_batch(SPLIT), initial(DROPOUT)
    step = jit(partial(train_step, model=DROPOUT, tx=TX))
    loss, losses = jit(partial(loss_of, model=DROPOUT)), set()
    for place in (0, 1, 7):
        state = start._replace(step=jnp.int32(place))
        new, metrics, values = step(state, batch, ROOT)
        assert_equal((new, metrics, values), step(state, batch, ROOT))
        key = steps.derive_key(ROOT, steps.DROPOUT, place)
        assert_close(metrics, loss(state.params, batch, key)[1])
        assert new.step == place + 1
        losses.add(float(metrics.loss_sum))
    losses.add(float(step(start, batch, jax.random.key(1))[1].loss_sum))
    losses.add(float(loss_of(start.params, batch, model=MLP)[1].loss_sum))  # no dropout
    assert len(losses) == 5


def test_an_epoch_equals_single_steps_over_unpadded_batches_and_is_traced_once():
    """The second epoch: a step's dropout is its own. The EMA weighs the parameters by its decay."""
    traced = []

    class Traced(models.MLP):
        @nn.compact
        def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
            traced.append(x.shape[0])
            return super().__call__(x, train=train)

    model = Traced(hidden_sizes=(32, 16), dropout=0.5)
    how: dict[str, Any] = {"tx": TX, "step_config": steps.StepConfig(ema_decay=0.75)}
    program = jit(partial(steps.train_steps, model=model, batch_size=BATCH_SIZE, **how))
    begun = jit(partial(steps.init_state, model=DROPOUT, **how))(ROOT)._replace(step=jnp.int32(3))
    epoch = begun, Metrics.zeros()
    for first, count in ((0, 2), (2, 1)):
        *epoch, log = program(*epoch, SPLIT, ORDER, ROOT, first, count)
    assert traced == [BATCH_SIZE]  # although the last batch is smaller
    step = jit(partial(train_step, model=DROPOUT, **how))
    state, metrics, seen = begun, Metrics.zeros(), []
    for start in range(0, SIZE, BATCH_SIZE):
        index = np.asarray(ORDER)[start : start + BATCH_SIZE]
        state, batch_metrics, _ = step(state, make_batch(SPLIT, index), ROOT)
        metrics = metrics.merge(batch_metrics)
        seen.append(state.params)
    assert_close((*epoch, log), (state, metrics, {}), atol=1e-5)
    mean = jax.tree.map(lambda *x: np.average(x, 0, weights=0.75 ** np.arange(3)[::-1]), *seen)
    assert_close(ema := ema_params(state.ema, 3, 0.75), mean)
    with jax.enable_x64(True):
        assert_equal(ema_params(state.ema, np.int32(3), 0.75), ema)


def test_values_that_are_not_logged_are_not_computed():
    program = partial(steps.train_steps, model=LOGISTIC, tx=SGD, batch_size=BATCH_SIZE)
    arguments = initial(LOGISTIC, SGD), Metrics.zeros(), SPLIT, ORDER, ROOT, 0, 3
    texts = [jit(partial(program, log_size=n)).lower(*arguments).compile() for n in (3, 0)]
    assert ["sqrt" in text.as_text() for text in texts] == [True, False]


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 4), (7, 1)])
def test_evaluation_counts_every_image_once_without_dropout(size, batch_size):
    split, params = make_split(size, 0), initial(DROPOUT).params
    program = jit(partial(steps.eval_steps, model=DROPOUT, batch_size=batch_size))
    count = num_batches(size, batch_size)
    assert (count - 1) * batch_size < size <= count * batch_size
    metrics = program(params, {}, Metrics.zeros(), split, 0, count)
    assert_close(metrics, steps.eval_step(params, {}, make_batch(split), model=MLP))
    in_calls = Metrics.zeros()
    for first in range(count):
        in_calls = program(params, {}, in_calls, split, first, 1)
    assert_equal(in_calls, metrics)
