"""Training and evaluation as pure functions: each step, an epoch's batches, their sums."""

import functools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax import models, steps
from mnist_jax.data.split import Split
from mnist_jax.metrics import NEVER, Metrics

ROOT = jax.random.key(0)
TX = optax.adam(1e-3)
SIZE, BATCH_SIZE = 10, 4  # an epoch of batches of 4, 4 and 2
MODELS = {
    "logistic": models.LogisticRegression(),
    "mlp": models.MLP(hidden_sizes=(32, 16), dropout=0.5),
    "cnn": models.CNN(dropout=0.0),
}


def make_split(size: int = SIZE, seed: int = 0) -> Split:
    """Images of 4x4 squares in random shades, whose first pixel is their index."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 4, 4, 1)).astype(np.uint8)
    image = image.repeat(7, axis=1).repeat(7, axis=2)
    image[:, 0, 0, 0] = np.arange(size)
    return Split(image, rng.integers(0, 10, size).astype(np.int32))


def make_batch(split: Split, index=slice(None)) -> steps.Batch:
    label = split.label[index]
    return {"image": split.image[index], "label": label, "mask": np.ones(len(label), bool)}


@functools.cache
def initial(model: nn.Module, tx: optax.GradientTransformation = TX) -> steps.TrainState:
    return jax.jit(partial(steps.init_state, model=model, tx=tx))(ROOT)


@functools.cache
def compiled(model: nn.Module, tx: optax.GradientTransformation = TX) -> Any:
    """`train_steps` as a program for any number of steps."""
    return jax.jit(partial(steps.train_steps, model=model, tx=tx, batch_size=BATCH_SIZE))


def order_of(epoch: int, size: int = SIZE) -> jax.Array:
    return steps.epoch_permutation(ROOT, epoch, size=size)


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same trees, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_close(ours: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    def check(a, b):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)

    jax.tree.map(check, ours, theirs)


# --- One batch


def test_pixels_become_numbers_from_0_to_1():
    pixels = np.arange(256, dtype=np.uint8)
    scaled = steps.to_input(jnp.asarray(pixels), normalize=True)
    assert scaled.dtype == jnp.float32
    np.testing.assert_allclose(scaled, pixels / 255, rtol=1e-6)
    assert (scaled[0], scaled[255]) == (0, 1)
    raw = steps.to_input(jnp.asarray(pixels), normalize=False)
    assert raw.dtype == jnp.float32
    np.testing.assert_array_equal(raw, pixels)


@pytest.mark.parametrize("normalize", [True, False])
def test_images_that_are_not_uint8_pass_as_they_are(normalize):
    image = jnp.linspace(-1, 300, 7, dtype=jnp.bfloat16)
    passed = steps.to_input(image, normalize=normalize)
    assert passed.dtype == image.dtype
    np.testing.assert_array_equal(passed, image)


def test_the_loss_is_the_mean_cross_entropy_and_the_sums_are_behind_it():
    model, split = MODELS["logistic"], make_split()
    params = initial(model).params
    loss, sums = steps.loss_fn(params, make_batch(split), model=model)
    logits = split.image.reshape(SIZE, -1) / 255.0 @ np.float64(params["logits"]["kernel"])
    log_total = np.log(np.exp(logits).sum(1))
    losses = log_total - logits[np.arange(SIZE), split.label]
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    assert sums.loss_sum == pytest.approx(losses.sum(), rel=1e-5)
    assert sums.correct == np.sum(logits.argmax(1) == split.label)
    assert sums.count == SIZE
    assert sums.first_nonfinite == NEVER
    assert (loss.dtype, sums.loss_sum.dtype) == (jnp.float32, jnp.float32)
    assert (sums.correct.dtype, sums.count.dtype) == (jnp.int32, jnp.int32)


@pytest.mark.parametrize(
    "call", ["loss_fn", "eval_step", "train_step", "train_steps", "eval_steps"]
)
def test_without_normalizing_the_model_sees_0_to_255(call):
    model, split = MODELS["logistic"], jax.device_put(make_split(BATCH_SIZE))
    state, batch, zeros = initial(model), make_batch(split), Metrics.zeros()
    by_hand = {**batch, "image": np.float32(batch["image"])}
    _, expected = steps.loss_fn(state.params, by_hand, model=model)
    order = jnp.arange(BATCH_SIZE)
    options = {"model": model, "recipe": steps.StepConfig(normalize=False)}
    sums = {
        "loss_fn": lambda: steps.loss_fn(state.params, batch, **options)[1],
        "eval_step": lambda: steps.eval_step(state.params, batch, **options),
        "train_step": lambda: steps.train_step(state, batch, ROOT, tx=TX, **options)[1],
        "train_steps": lambda: steps.train_steps(
            state, zeros, split, order, ROOT, 0, 1, tx=TX, batch_size=BATCH_SIZE, **options
        )[1],
        "eval_steps": lambda: steps.eval_steps(
            state.params, zeros, split, 0, 1, batch_size=BATCH_SIZE, **options
        ),
    }[call]
    assert_close(jax.jit(sums)(), expected)


def test_in_bfloat16_the_loss_and_the_gradients_are_float32():
    split = make_split()
    narrow, wide = models.MLP(dtype=jnp.bfloat16), models.MLP()
    params = initial(wide).params
    results = {}
    for model in (narrow, wide):
        value_and_grad = jax.value_and_grad(partial(steps.loss_fn, model=model), has_aux=True)
        (loss, sums), grads = jax.jit(value_and_grad)(params, make_batch(split))
        assert {a.dtype for a in (loss, sums.loss_sum, *jax.tree.leaves(grads))} == {
            jnp.dtype("float32")
        }
        results[model.dtype] = float(loss)
    assert results[jnp.bfloat16] != results[None]
    assert results[jnp.bfloat16] == pytest.approx(results[None], rel=0.01)


def test_masked_rows_change_nothing_whatever_they_hold():
    model, split, garbage = models.MLP(), make_split(5), make_split(3, seed=9)
    params, key = initial(model).params, None
    step = jax.jit(jax.value_and_grad(partial(steps.loss_fn, model=model), has_aux=True))
    real = make_batch(split)
    padded = {
        "image": np.concatenate([split.image, garbage.image]),
        "label": np.concatenate([split.label, garbage.label]),
        "mask": np.arange(8) < 5,
    }
    (loss, sums), grads = step(params, padded, key)
    assert sums.count == 5
    assert_close(((loss, sums), grads), step(params, real, key))
    other = {**padded, "image": padded["image"].copy(), "label": padded["label"].copy()}
    other["image"][5:], other["label"][5:] = 255, 3
    assert_equal(((loss, sums), grads), step(params, other, key))
    # Not only at the end: nothing may depend on where the padding stands.
    turned = {name: value[::-1] for name, value in padded.items()}
    assert_close(((loss, sums), grads), step(params, turned, key))


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
    model = models.MLP()
    batch = {**make_batch(make_split()), "mask": np.zeros(SIZE, bool)}
    value_and_grad = jax.value_and_grad(partial(steps.loss_fn, model=model), has_aux=True)
    (loss, sums), grads = jax.jit(value_and_grad)(initial(model).params, batch)
    assert (loss, sums.loss_sum, sums.count, sums.correct) == (0, 0, 0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# --- Keys


def test_keys_differ_by_root_purpose_and_place():
    keys = [
        steps.derive_key(jax.random.key(seed), purpose, place)
        for seed in (0, 1)
        for purpose in (steps.INIT, steps.SHUFFLE, steps.DROPOUT)
        for place in range(4)
    ]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 24


def test_dropout_is_addressed_by_the_step_and_the_root_key():
    model, batch = MODELS["mlp"], make_batch(make_split())
    step = jax.jit(partial(steps.train_step, model=model, tx=TX))
    loss = jax.jit(partial(steps.loss_fn, model=model))
    start = initial(model)
    losses = set()
    for place in (0, 1, 2, 7):
        state = start._replace(step=jnp.int32(place))
        new, sums = step(state, batch, ROOT)
        assert_equal((new, sums), step(state, batch, ROOT))
        keys = [steps.derive_key(ROOT, use, place) for use in (steps.DROPOUT, steps.AUGMENT)]
        assert_close(sums, loss(state.params, batch, tuple(keys))[1])
        assert new.step == place + 1
        losses.add(float(sums.loss_sum))
    losses.add(float(step(start, batch, jax.random.key(1))[1].loss_sum))
    losses.add(float(loss(start.params, batch)[1].loss_sum))  # no dropout
    assert len(losses) == 6


def test_the_root_key_fixes_the_first_state():
    model = MODELS["mlp"]
    make = jax.jit(partial(steps.init_state, model=model, tx=TX))
    state = make(ROOT)
    assert (state.step, state.step.dtype) == (0, jnp.int32)
    assert_equal(state, make(jax.random.key(0)))
    assert_equal(state.opt_state, TX.init(state.params))
    other = make(jax.random.key(1)).params
    assert not np.array_equal(state.params["logits"]["kernel"], other["logits"]["kernel"])


@pytest.mark.parametrize("parts", [2, 4])
def test_in_microbatches_the_gradient_is_that_of_the_whole_batch(parts):
    """Of a batch that they do not divide, with a row that counts for nothing."""
    model, split = models.MLP(hidden_sizes=(32, 16)), jax.device_put(make_split(BATCH_SIZE + 1))
    take = partial(steps.take_batch, split, None, 0, batch_size=BATCH_SIZE + 1)
    after = {}
    for count in (1, parts):
        recipe, batch = steps.StepConfig(microbatches=count), take(microbatches=count)
        assert len(batch["label"]) % count == 0
        batch["mask"] = batch["mask"].at[1].set(False)
        step = jax.jit(partial(steps.train_step, model=model, tx=optax.sgd(1.0), recipe=recipe))
        after[count] = step(initial(model, optax.sgd(1.0)), batch, ROOT)
    assert_close(after[parts], after[1])
    assert after[1][1].count == BATCH_SIZE


def test_each_microbatch_has_draws_of_its_own():
    model, tx = MODELS["mlp"], optax.sgd(1.0)
    batch = make_batch(jax.device_put(make_split(1)), np.zeros(2, int))  # one image twice
    recipe = steps.StepConfig(microbatches=2)

    def moved(batch):
        step = jax.jit(partial(steps.train_step, model=model, tx=tx, recipe=recipe))
        return jax.tree.leaves(step(initial(model, tx), batch, ROOT)[0].params)

    halves = [moved({**batch, "mask": np.arange(2) == row}) for row in (0, 1)]
    assert not all(map(np.array_equal, *halves))


# --- An epoch's batches


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 4), (101, 100), (7, 1)])
def test_an_epoch_visits_every_example_once_the_last_smaller_batch_included(
    size, batch_size, parts
):
    split, order = make_split(size), order_of(3, size)
    count = steps.num_batches(size, batch_size)
    assert (count - 1) * batch_size < size <= count * batch_size
    take = jax.jit(partial(steps.take_batch, batch_size=batch_size, microbatches=parts))
    visited = []
    for i in range(count):
        batch = take(split, order, i)
        assert batch["image"].shape == (-(-batch_size // parts) * parts, 28, 28, 1)
        assert batch["image"].dtype == jnp.uint8
        index = batch["image"][:, 0, 0, 0][batch["mask"]]
        np.testing.assert_array_equal(batch["label"][batch["mask"]], split.label[index])
        np.testing.assert_array_equal(batch["image"][batch["mask"]], split.image[index])
        assert np.all(batch["mask"][:batch_size]) or i == count - 1
        visited += index.tolist()
    assert visited == order.tolist()
    assert sorted(visited) == list(range(size))


def test_without_an_order_batches_come_as_they_stand():
    split = make_split()
    batches = [steps.take_batch(split, None, i, batch_size=BATCH_SIZE) for i in range(3)]
    index = [n for batch in batches for n in batch["image"][:, 0, 0, 0][batch["mask"]].tolist()]
    assert index == list(range(SIZE))


def test_the_order_differs_by_epoch_and_by_seed_and_is_the_same_for_the_same():
    orders = {
        (seed, epoch): steps.epoch_permutation(jax.random.key(seed), epoch, size=100)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    for (seed, epoch), order in orders.items():
        assert order.dtype == jnp.int32
        assert_equal(
            order, steps.epoch_permutation(jax.random.key(seed), jnp.int32(epoch), size=100)
        )
    assert len({tuple(order.tolist()) for order in orders.values()} | {tuple(range(100))}) == 7


def test_every_example_is_as_likely_at_every_place():
    epochs, size = 1_200, 6
    orders = jax.vmap(lambda epoch: order_of(epoch, size))(jnp.arange(epochs))
    counts = np.stack([np.sum(np.asarray(orders) == n, axis=0) for n in range(size)])
    expected = epochs / size
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert chi_squared < 52.6  # 25 degrees of freedom: one seed in a thousand lies above


def test_neighbours_in_the_order_ascend_as_often_as_they_descend():
    """Ties between the random numbers sorted by would show as too many ascents."""
    size = 60_000
    ascents = np.sum(np.diff(np.asarray(order_of(0, size))) > 0)
    assert abs(ascents - (size - 1) / 2) < 4 * np.sqrt((size + 1) / 12)


# --- Many steps


@pytest.mark.parametrize("name", MODELS)
def test_steps_in_one_call_equal_calls_of_one_step_bit_for_bit(name):
    model, split, order = MODELS[name], make_split(), order_of(0)
    program, start = compiled(model), initial(model)
    together = program(start, Metrics.zeros(), split, order, ROOT, 0, 3)
    carry = start, Metrics.zeros()
    for first in range(3):
        carry = program(*carry, split, order, ROOT, first, 1)
    assert_equal(carry, together)
    state, sums = together
    assert state.step == 3
    assert sums.count == SIZE
    assert program(*together, split, order, ROOT, 0, 0)[0].step == 3  # no steps, no change


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_an_epoch_equals_a_loop_of_single_steps_over_unpadded_batches(name):
    # Without dropout, whose mask has another shape for the smaller batch.
    model = MODELS["logistic"] if name == "logistic" else models.MLP()
    split, order = make_split(), order_of(0)
    epoch = compiled(model)(initial(model), Metrics.zeros(), split, order, ROOT, 0, 3)
    step = jax.jit(partial(steps.train_step, model=model, tx=TX))
    state, sums = initial(model), Metrics.zeros()
    for start in range(0, SIZE, BATCH_SIZE):
        state, batch_sums = step(
            state, make_batch(split, np.asarray(order)[start : start + BATCH_SIZE]), ROOT
        )
        sums = sums.merge(batch_sums)
    assert sums.count == SIZE
    assert_close(epoch, (state, sums), atol=1e-5)


def test_a_loop_of_known_length_equals_one_of_run_time_length():
    model, split, order = MODELS["mlp"], make_split(), order_of(0)
    arguments = initial(model), Metrics.zeros(), split, order, ROOT, 0
    known = jax.jit(partial(steps.train_steps, model=model, tx=TX, batch_size=BATCH_SIZE, steps=3))(
        *arguments
    )
    assert_close(known, compiled(model)(*arguments, 3), atol=1e-5)


class Traced(models.MLP):
    """Notes each time that it is traced."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        self.seen.append(x.shape[0])
        return super().__call__(x, train=train)

    seen = []  # noqa: RUF012


def test_the_step_is_traced_once_over_epochs_whose_last_batch_is_smaller():
    model, split = Traced(hidden_sizes=(8,)), make_split()
    carry = initial(model), Metrics.zeros()
    Traced.seen.clear()
    program = compiled(model)
    for epoch in range(2):
        for first, count in ((0, 2), (2, 1)):
            carry = program(*carry, split, order_of(epoch), ROOT, first, count)
    assert Traced.seen == [BATCH_SIZE]

    Traced.seen.clear()
    step = jax.jit(partial(steps.train_step, model=model, tx=TX))
    state, _ = carry
    for i in range(3):
        batch = steps.take_batch(split, order_of(2), i, batch_size=BATCH_SIZE)
        state, _ = step(state, batch, ROOT)
    assert Traced.seen == [BATCH_SIZE]


# The CNN at a rate low enough that a rounding difference between machines changes nothing: at 1e-3
# its loss on so few images leaps up again now and then.
@pytest.mark.parametrize(
    ("name", "epochs", "learning_rate"),
    [("logistic", 200, 1e-3), ("mlp", 60, 1e-3), ("cnn", 25, 3e-4)],
)
def test_ten_images_with_random_labels_are_learned(name, epochs, learning_rate):
    model = models.MLP() if name == "mlp" else MODELS[name]  # each without dropout
    tx = optax.adam(learning_rate)
    split, program = make_split(), compiled(model, tx)
    state = start = initial(model, tx)
    for epoch in range(epochs):
        state, _ = program(state, Metrics.zeros(), split, order_of(epoch), ROOT, 0, 3)
    evaluate = jax.jit(partial(steps.eval_step, model=model))
    first, last = (evaluate(params, make_batch(split)) for params in (start.params, state.params))
    assert first.loss > 2
    assert last.loss < 0.03
    assert last.correct == SIZE


@pytest.mark.parametrize("bad_step", [2, 5])
def test_the_first_step_whose_loss_is_not_finite_is_named(bad_step):
    """The update before it is so large that the logits overflow."""
    model, split = MODELS["logistic"], make_split()
    tx = optax.adam(lambda count: jnp.where(count < bad_step - 2, 1e-3, 1e38))
    program = compiled(model, tx)
    carry = initial(model, tx), Metrics.zeros()
    named = []
    for step in range(1, 8):
        carry = program(*carry, split, order_of(0), ROOT, (step - 1) % 3, 1)
        named.append(int(carry[1].first_nonfinite))
    assert named == [NEVER] * (bad_step - 1) + [bad_step] * (8 - bad_step)
    state, _ = program(initial(model, tx), Metrics.zeros(), split, order_of(0), ROOT, 0, 3)
    _, sums = program(state, Metrics.zeros(), split, order_of(1), ROOT, 0, 3)
    assert sums.first_nonfinite == max(bad_step, 4)  # of these sums' own steps, 4 to 6


# --- Evaluation


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 4), (7, 1)])
def test_evaluation_counts_every_image_of_a_split_no_batch_divides(size, batch_size):
    model, split = MODELS["mlp"], make_split(size)
    params = initial(model).params
    program = jax.jit(partial(steps.eval_steps, model=model, batch_size=batch_size))
    count = steps.num_batches(size, batch_size)
    sums = program(params, Metrics.zeros(), split, 0, count)
    assert sums.count == size
    assert_close(sums, steps.eval_step(params, make_batch(split), model=model))
    in_calls = Metrics.zeros()
    for first in range(count):
        in_calls = program(params, in_calls, split, first, 1)
    assert_equal(in_calls, sums)


def test_evaluation_is_repeatable_drops_nothing_and_changes_nothing():
    model, batch = MODELS["mlp"], make_batch(make_split())
    params = initial(model).params
    before = jax.tree.map(np.array, params)
    evaluate = jax.jit(partial(steps.eval_step, model=model))
    sums = evaluate(params, batch)
    assert_equal(sums, evaluate(params, batch))
    assert_equal(before, params)
    without = model.clone(dropout=0.0)
    assert_close(sums, steps.eval_step(params, batch, model=without))


# --- Sums


def test_merged_sums_are_the_sums_over_all_examples():
    model, split = MODELS["logistic"], make_split()
    evaluate = partial(steps.eval_step, initial(model).params, model=model)
    parts = [evaluate(make_batch(split, index)) for index in (slice(0, 7), slice(7, 10))]
    whole = evaluate(make_batch(split))
    assert_close(parts[0].merge(parts[1]), whole)
    assert_equal(parts[0].merge(parts[1]), parts[1].merge(parts[0]))
    assert_equal(Metrics.zeros().merge(whole), whole)
    merged = parts[0].merge(parts[1])
    assert merged.loss == pytest.approx(float(whole.loss_sum) / SIZE)
    assert merged.accuracy == int(whole.correct) / SIZE


def test_means_are_divided_once_and_by_the_examples():
    def sums(loss_sum, correct, count, first_nonfinite=NEVER):
        return Metrics(
            jnp.float32(loss_sum),
            jnp.int32(correct),
            jnp.int32(count),
            jnp.int32(first_nonfinite),
        )

    merged = sums(8, 4, 4).merge(sums(1, 0, 1, 7)).merge(sums(0, 0, 0, 3))
    assert (merged.loss, merged.accuracy) == (9 / 5, 4 / 5)
    assert merged.first_nonfinite == 3
    assert (Metrics.zeros().loss, Metrics.zeros().accuracy) == (0, 0)


def test_the_order_does_not_depend_on_64_bit_mode():
    def order():
        return np.asarray(
            steps.epoch_permutation(jax.random.key(3, impl="threefry2x32"), 1, size=100)
        )

    expected = order()
    with jax.enable_x64(True):
        np.testing.assert_array_equal(order(), expected)
