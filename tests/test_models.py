"""The networks: shapes, initial parameters, dropout and the table of layers."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_jax import models
from mnist_jax.ops.dense import NARROW

KEY = jax.random.key(0)
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# (name, kind, output shape, parameters) of each layer, as in the tutorial.
TABLES = {
    "logistic": [("flatten", "Flatten", (784,), 0), ("logits", "Dense", (10,), 7_850)],
    "mlp": [
        ("flatten", "Flatten", (784,), 0),
        ("dense1", "Dense", (256,), 200_960),
        ("dense2", "Dense", (128,), 32_896),
        ("dense3", "Dense", (64,), 8_256),
        ("dense4", "Dense", (32,), 2_080),
        ("logits", "Dense", (10,), 330),
    ],
    "cnn": [
        ("conv1", "Conv", (28, 28, 64), 640),
        ("conv2", "Conv", (28, 28, 64), 36_928),
        ("pool1", "MaxPool", (14, 14, 64), 0),
        ("conv3", "Conv", (14, 14, 128), 73_856),
        ("conv4", "Conv", (12, 12, 256), 295_168),
        ("pool2", "MaxPool", (6, 6, 256), 0),
        ("flatten", "Flatten", (9_216,), 0),
        ("dense1", "Dense", (512,), 4_719_104),
        ("dropout1", "Dropout", (512,), 0),
        ("dense2", "Dense", (256,), 131_328),
        ("dropout2", "Dropout", (256,), 0),
        ("logits", "Dense", (10,), 2_570),
    ],
}


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_the_layers_and_parameters_are_the_tutorials(name, table):
    model = models.make_model(name)
    assert [tuple(row) for row in models.layers(model)] == table
    shapes = models.variable_shapes(model)[0]
    assert models.count_parameters(shapes) == sum(parameters for *_, parameters in table)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", models.MODELS)
def test_kernels_are_glorot_uniform_and_biases_zero(name):
    params, state = jit(partial(models.init_variables, models.MODELS[name]()))(KEY)
    assert state == {}
    for layer, weights in params.items():
        kernel, bias = np.asarray(weights["kernel"]), np.asarray(weights["bias"])
        receptive_field = np.prod(kernel.shape[:-2])
        limit = np.sqrt(6 / (receptive_field * (kernel.shape[-2] + kernel.shape[-1])))
        assert 0.95 * limit < np.abs(kernel).max() <= limit, layer
        assert np.std(kernel) == pytest.approx(limit / np.sqrt(3), rel=0.1), layer
        assert abs(np.mean(kernel)) < 4 * limit / np.sqrt(3 * kernel.size), layer
        assert not bias.any(), layer


@pytest.mark.parametrize(
    ("model", "rate"),
    [(models.CNN(), 0.5), (models.MLP(hidden_sizes=(8, 8), dropout=0.25), 0.25)],
)
def test_both_hidden_layers_have_dropout_in_training(model, rate):
    found = []

    def record(call, args, kwargs, context):
        if isinstance(layer := context.module, nn.Dropout):
            found.append((layer.rate, layer.deterministic))
        return call(*args, **kwargs)

    variables, image = {"params": models.variable_shapes(model)[0]}, jnp.zeros((2, 28, 28, 1))
    with nn.intercept_methods(record):
        for train in (True, False):
            apply = partial(model.apply, train=train, rngs={"dropout": KEY})
            jax.eval_shape(apply, variables, image)
    assert found == [(rate, False)] * 2 + [(rate, True)] * 2


@pytest.mark.parametrize(("features", "batch"), [(10, (100,)), (NARROW, ()), (NARROW + 1, (3, 4))])
def test_a_dense_layer_computes_what_flax_computes(features, batch):
    x = jax.random.normal(KEY, (*batch, 784))
    ours, theirs = models.dense(features), nn.Dense(features)
    params = ours.init(KEY, x)

    def derivatives(layer, params, x):
        """Value, both gradients, and the derivative along (params, x)."""

        def loss(*args):
            return jnp.sum(jnp.sin(layer.apply(*args)))

        along = jax.jvp(loss, (params, x), (params, x))
        return jax.value_and_grad(loss, argnums=(0, 1))(params, x), along

    with jax.default_matmul_precision("highest"):
        got, want = (jit(partial(derivatives, layer))(params, x) for layer in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_images_classes_and_hidden_sizes_decide_the_shapes():
    fields = {"image_shape": (16, 12, 3), "num_classes": 26, "hidden_sizes": (5,)}
    model = models.make_model("cnn", **fields)
    shapes = models.variable_shapes(model)[0]
    assert shapes["conv1"]["kernel"].shape == (3, 3, 3, 64)
    assert shapes["dense1"]["kernel"].shape == (1536, 5)  # 3 × 2 pixels of 256 channels
    assert shapes["logits"]["bias"].shape == (26,)
