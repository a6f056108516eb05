"""The networks against Keras, and the optimizer against Adam written by hand.

`reference/keras.json` holds what Keras computes in float64, made by
`reference/make_keras_reference.py`.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import weights

from mnist_jax import models, steps
from mnist_jax.config import Config
from mnist_jax.ops import convolution
from mnist_jax.optimizer import make_optimizer

KERAS = json.loads((Path(__file__).parent / "reference" / "keras.json").read_text())


@contextlib.contextmanager
def exact(dtype: str) -> Iterator[None]:
    """float64 where asked for, and products that keep all bits of their factors."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def make_batch(dtype: str) -> steps.Batch:
    """The reference's batch. Its pixels are divided already: floating point passes `to_input`."""
    image, label = weights.make_batch()
    mask = np.ones(len(label), bool)
    return {"image": jnp.asarray(image, dtype), "label": jnp.asarray(label), "mask": mask}


def make_params(name: str, dtype: str) -> Any:
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), weights.make_weights(name))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("name", weights.KERNELS)
def test_the_seeded_numbers_are_those_keras_was_given(name):
    assert weights.fingerprint(name) == KERAS["models"][name]["fingerprint"]


# Bounds of relative errors; `direction` is for a gradient's projections, which show the error of
# every entry where the norm shows only what adds up.
@pytest.mark.parametrize(
    ("dtype", "bound", "direction"), [("float64", 1e-12, 1e-12), ("float32", 1e-5, 5e-5)]
)
@pytest.mark.parametrize("name", weights.KERNELS)
def test_logits_loss_and_every_gradient_equal_keras(name, dtype, bound, direction):
    reference = KERAS["models"][name]
    model = models.MODELS[name]()
    value_and_grad = jax.value_and_grad(partial(steps.loss_fn, model=model), has_aux=True)

    @jax.jit
    def compute(params, batch):
        return model.apply({"params": params}, batch["image"]), *value_and_grad(params, batch)

    with exact(dtype):
        params, batch = make_params(name, dtype), make_batch(dtype)
        logits, (loss, sums), grads = compute(params, batch)

    assert logits.dtype == loss.dtype == dtype
    assert relative_error(logits, reference["logits"]) < bound
    assert loss == pytest.approx(reference["loss"], rel=bound)
    assert sums.correct == np.sum(np.argmax(reference["logits"], 1) == batch["label"])
    assert models.count_parameters(params) == reference["parameters"]
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for layer, kinds in reference["gradients"].items():
        for kind, theirs in kinds.items():
            assert grads[layer][kind].dtype == dtype
            ours = np.asarray(grads[layer][kind], np.float64)
            error = abs(np.linalg.norm(ours) - theirs["norm"]) / theirs["norm"]
            assert error < bound, f"norm of {layer}/{kind}"
            projections = weights.make_probes(ours.shape) @ ours.ravel()
            error = np.abs(projections - theirs["projections"]).max() / theirs["norm"]
            assert error < direction, f"projections of {layer}/{kind}"


def test_pooling_passes_gradients_to_the_pixel_that_keras_chooses_among_equals():
    activations, cotangent = weights.make_ties()
    pooled, backward = jax.vjp(convolution.max_pool_2x2, jnp.asarray(activations, jnp.float32))
    (gradient,) = backward(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_array_equal(pooled, KERAS["pooling"]["output"])
    np.testing.assert_array_equal(gradient, KERAS["pooling"]["gradient"])


def adam(
    param: np.ndarray, grads: list[np.ndarray], learning_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kingma and Ba's Adam (2015, algorithm 1), one update for each of `grads`.

    Epsilon is added after the bias correction, as they, Optax and PyTorch do. Keras adds it before
    (their "epsilon hat"), which for the same number is a larger epsilon in the first steps.

    Returns:
        The updated parameter, and its last update.
    """
    b1, b2, epsilon = 0.9, 0.999, 1e-7
    m = v = update = np.zeros_like(param)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        update = -learning_rate * m_hat / (np.sqrt(v_hat) + epsilon)
        param = param + update
    return param, update


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_three_steps_equal_adam_by_hand(name):
    learning_rate = 0.01
    tx = make_optimizer(Config(model=name, learning_rate=learning_rate), 1)
    model = models.MODELS[name]()
    with exact("float64"):
        batch = make_batch("float64")
        step = jax.jit(partial(steps.train_step, model=model, tx=tx))
        gradient = jax.jit(jax.grad(partial(steps.loss_fn, model=model), has_aux=True))
        params = make_params(name, "float64")
        state = steps.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        by_hand = start = weights.make_weights(name)
        history = []
        for t in range(1, 4):
            state, _ = step(state, batch, jax.random.key(0))
            # By hand from its own parameters: an error would grow, not be forgotten.
            history.append(jax.tree.map(np.asarray, gradient(by_hand, batch)[0]))
            pairs = jax.tree.map(lambda w, *gs: adam(w, list(gs), learning_rate), start, *history)
            by_hand = {
                layer: {kind: pair[0] for kind, pair in kinds.items()}
                for layer, kinds in pairs.items()
            }
            for layer, kinds in pairs.items():
                for kind, (theirs, update) in kinds.items():
                    ours = np.asarray(state.params[layer][kind])
                    assert np.abs(update).max() > learning_rate / 2
                    error = np.abs(ours - theirs).max() / learning_rate
                    assert error < 1e-9, f"{layer}/{kind} after step {t}"
        assert state.step == 3
