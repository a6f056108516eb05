"""The optimizers that a config describes, and their schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax import OPTIMIZERS, Config
from mnist_jax.optimizer import make_optimizer

PARAMS = {"kernel": jnp.full((2, 2), 8.0), "bias": jnp.full(2, 8.0)}


def optimizer_of(steps: int = 1, **fields: Any) -> optax.GradientTransformation:
    return make_optimizer(**Config(**fields).optimizer_arguments(), steps=steps)


def learning_rates(steps: int, **fields: Any) -> np.ndarray:
    """The sizes of Adam's updates under a constant gradient."""
    tx = optimizer_of(steps, **fields)

    def update(state, _):
        updates, state = tx.update({"w": jnp.ones(())}, state, {"w": jnp.zeros(())})
        return state, -updates["w"]

    return np.asarray(jax.lax.scan(update, tx.init({"w": jnp.zeros(())}), length=steps)[1])


def test_schedules():
    names = ("constant", "cosine", "onecycle")
    constant, cosine, onecycle = (learning_rates(100, schedule=n, learning_rate=0.5) for n in names)
    np.testing.assert_allclose(constant, 0.5, rtol=1e-3)
    assert [cosine[0], max(onecycle)] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert onecycle[0] == pytest.approx(0.5 / 25, rel=1e-3)
    assert np.argmax(onecycle) == 30 and max(cosine[-1], onecycle[-1]) < 0.001


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({}, optax.adam(1e-3, eps=1e-7)),  # Keras's
        ({"optimizer": "adamw"}, optax.adamw(1e-3)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, optax.adamw(1e-3, weight_decay=0.1)),
        ({"optimizer": "sgd"}, optax.sgd(1e-3)),
        ({"optimizer": "sgd", "momentum": 0.9}, optax.sgd(1e-3, momentum=0.9)),
        ({"optimizer": "lion"}, optax.lion(1e-3)),
        ({"optimizer": "muon"}, optax.contrib.muon(1e-3)),
    ],
)
def test_an_optimizer_of_a_name_is_that_of_optax(fields, theirs, monkeypatch):
    ours = optimizer_of(**fields)
    monkeypatch.setitem(OPTIMIZERS, fields.get("optimizer", "adam"), None)  # as a fork may, later
    grads = jax.tree.map(lambda leaf: 1e-8 * leaf, PARAMS)  # as small as epsilon
    params = [PARAMS, PARAMS]
    for i, tx in enumerate((ours, theirs)):
        state = tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(grads, state, params[i])
            params[i] = optax.apply_updates(params[i], updates)
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_weight_decay_of_adam_applies_to_kernels_only():
    tx = optimizer_of(weight_decay=0.1, learning_rate=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 8.0)
    np.testing.assert_array_equal(updates["bias"], 0)
