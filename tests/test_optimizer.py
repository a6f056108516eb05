"""What a recipe's fields do to the optimizer and the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax import Config, evaluate, fit, models, steps
from mnist_jax import optimizer as recipe
from mnist_jax.config import PRESETS
from mnist_jax.inference.verify import verify


def learning_rates(config: Config, total: int) -> list[float]:
    """What each update of a parameter with a constant gradient amounts to: Adam's step size."""
    tx = recipe.make_optimizer(config, total)
    params = {"w": jnp.zeros(())}
    state, rates = tx.init(params), []
    for _ in range(total):
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    return rates


def test_schedules_go_where_they_should():
    rates = {
        name: learning_rates(Config(schedule=name, learning_rate=0.5), 100)
        for name in ("constant", "cosine", "onecycle")
    }
    np.testing.assert_allclose(rates["constant"], 0.5, rtol=1e-3)
    assert rates["cosine"][0] == pytest.approx(0.5, rel=1e-3)
    assert rates["cosine"][-1] < 0.001
    assert rates["onecycle"][0] == pytest.approx(0.5 / 25, rel=1e-3)
    assert np.argmax(rates["onecycle"]) == 30
    assert max(rates["onecycle"]) == pytest.approx(0.5, rel=1e-3)
    assert rates["onecycle"][-1] < 0.001


def test_weight_decay_takes_from_kernels_alone():
    config = Config(weight_decay=0.1, learning_rate=0.5)
    params = {"kernel": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0)}
    tx = recipe.make_optimizer(config, 1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 8.0)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_the_average_is_that_of_the_parameters_after_each_update():
    config = Config(ema_decay=0.75)
    tx = recipe.make_optimizer(config, 5)
    params = {"w": jnp.array([1.0, -2.0])}
    state, seen = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update({"w": jnp.array([0.3, -0.1])}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
    weights = 0.75 ** np.arange(5)[::-1]
    expected = np.average(seen, axis=0, weights=weights)
    np.testing.assert_allclose(recipe.ema_params(params, state, 0.75)["w"], expected, rtol=1e-5)
    assert recipe.ema_params(params, state, 0.0) is params


def test_the_post_s_optimizer_is_plain_adam():
    params = models.param_shapes(models.MLP())
    plain = jax.eval_shape(optax.adam(1e-3, eps=1e-7).init, params)
    ours = jax.eval_shape(recipe.make_optimizer(Config(), 1).init, params)
    assert jax.tree.structure(ours) == jax.tree.structure(plain)


def test_smoothed_labels_are_spread_while_training_alone():
    model = models.LogisticRegression()
    params = models.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 28, 28, 1), np.uint8)
    label = rng.integers(0, 10, 8, np.int32)
    batch = steps.Batch(image=image, label=label, mask=np.ones(8, bool))
    keys = (jax.random.key(1), jax.random.key(2))
    smooth = steps.StepConfig(label_smoothing=0.3)
    logits = model.apply({"params": params}, image / np.float32(255))
    target = optax.smooth_labels(jax.nn.one_hot(label, 10), 0.3)
    expected = optax.softmax_cross_entropy(logits, target).mean()
    trained, _ = steps.loss_fn(params, batch, keys, model=model, recipe=smooth)
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
    evaluated, _ = steps.loss_fn(params, batch, model=model, recipe=smooth)
    plain, _ = steps.loss_fn(params, batch, model=model)
    assert evaluated == plain


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_is_repeatable(preset, data_dir, tmp_path):
    where = {"dataset": "digits", "data_dir": data_dir}
    records = [
        fit(Config(model="mlp", preset=preset, epochs=2, workdir=tmp_path / name, **where)).record
        for name in "ab"
    ]
    assert records[0]["params_sha256"] == records[1]["params_sha256"]
    assert records[0]["test_accuracy"] > 0.2


def test_augmented_runs_do_not_depend_on_the_steps_in_a_call(data_dir, tmp_path):
    where = {"dataset": "digits", "data_dir": data_dir, "max_steps": 20, "ema_decay": 0.9}
    digests = {
        fit(
            Config(model="mlp", preset="best", steps_per_call=n, workdir=tmp_path / str(n), **where)
        ).record["params_sha256"]
        for n in (1, 7, 100)
    }
    assert len(digests) == 1


def test_a_run_is_read_back_whatever_its_schedule_needs(monkeypatch, data_dir, tmp_path):
    """A rise of 10 steps is no schedule for fewer."""

    def rising(config, steps):
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, 10, steps)

    monkeypatch.setattr(recipe, "_schedule", rising)
    config = Config(
        model="logistic", dataset="digits", epochs=1, data_dir=data_dir, workdir=tmp_path / "run"
    )
    record = fit(config).record
    assert evaluate(tmp_path / "run", data_dir=data_dir)["correct"] == record["test_correct"]
    assert all(check.good for check in verify(tmp_path / "run"))
