"""The networks against Keras 3.15.1 in float64, by reference/make_keras_reference.py of 81186e5."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import weights

from mnist_jax import models, steps
from mnist_jax.ops.pooling import max_pool_2x2

KERAS = json.loads((Path(__file__).parent / "reference" / "keras.json").read_text())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("logistic", "mlp") for dtype in ("float32", "float64")),
        ("cnn", "float32"),
        pytest.param("cnn", "float64", marks=pytest.mark.campaign),
    ],
)
def test_logits_loss_and_every_gradient_equal_keras(name, dtype):
    # Relative errors. The projections of a gradient show the error of every entry.
    bound, projection_bound = {"float32": (1e-5, 5e-5), "float64": (1e-12, 1e-12)}[dtype]
    reference, model = KERAS["models"][name], models.MODELS[name]()
    model = model.clone(dropout=0.0) if name == "cnn" else model
    value_and_grad = jax.value_and_grad(partial(steps.loss_fn, model=model), has_aux=True)

    @jax.jit
    def compute(params, batch):
        found = value_and_grad(params, {}, batch, jax.random.key(0))
        return model.apply({"params": params}, batch["image"]), *found

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        params = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights.make_weights(name))
        image, label = weights.make_batch()  # floating-point pixels are not normalized again
        mask = jnp.ones(len(label), bool)
        batch = {"image": jnp.asarray(image, dtype), "label": jnp.asarray(label), "mask": mask}
        logits, (loss, (metrics, _)), grads = compute(params, batch)

    assert logits.dtype == loss.dtype == dtype
    expected = np.asarray(reference["logits"])
    assert logits.shape == expected.shape
    error = np.linalg.norm(np.asarray(logits, np.float64) - expected)
    assert error < bound * np.linalg.norm(expected)
    assert loss == pytest.approx(reference["loss"], rel=bound)
    assert metrics.correct == np.sum(np.argmax(reference["logits"], 1) == label)
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
            assert error < projection_bound, f"projections of {layer}/{kind}"


def test_of_equal_pixels_pooling_chooses_the_one_that_keras_chooses():
    activations, cotangent = weights.make_ties()
    pooled, backward = jax.vjp(max_pool_2x2, jnp.asarray(activations, jnp.float32))
    (gradient,) = backward(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_array_equal(pooled, KERAS["pooling"]["output"])
    np.testing.assert_array_equal(gradient, KERAS["pooling"]["gradient"])
