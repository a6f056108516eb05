"""The optimizer that a config describes: schedule, weight decay, EMA of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax import Config
from mnist_jax.optimizer import ema_params, make_optimizer


def learning_rates(config: Config, steps: int) -> np.ndarray:
    """The sizes of Adam's updates under a constant gradient."""
    tx = make_optimizer(config.resolve(), steps)

    def update(state, _):
        updates, state = tx.update({"w": jnp.ones(())}, state, {"w": jnp.zeros(())})
        return state, -updates["w"]

    return np.asarray(jax.lax.scan(update, tx.init({"w": jnp.zeros(())}), length=steps)[1])


def test_schedules():
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


def test_the_tutorials_optimizer_is_keras_adam():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = jax.tree.map(lambda leaf: 1e-7 * leaf, params)  # as small as epsilon
    tx, adam = make_optimizer(Config().resolve(), 1), optax.adam(1e-3, eps=1e-7)
    ours, theirs = (t.update(grads, t.init(params), params)[0] for t in (tx, adam))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_weight_decay_applies_to_kernels_only():
    params = {"kernel": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0)}
    tx = make_optimizer(Config(weight_decay=0.1, learning_rate=0.5).resolve(), 1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 8.0)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_the_ema_is_the_weighted_mean_of_the_parameters_after_each_update():
    tx, params = make_optimizer(Config(ema_decay=0.75).resolve(), 5), {"w": jnp.array([1.0, -2.0])}
    state, seen = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update({"w": jnp.array([0.3, -0.1])}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
    expected = np.average(seen, axis=0, weights=0.75 ** np.arange(5)[::-1])
    np.testing.assert_allclose(ema_params(params, state, 0.75)["w"], expected, rtol=1e-5)
    assert ema_params(params, state, 0.0) is params
