"""The networks: their shape, their first weights, and what comes out of them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_jax import Config, fit, models
from mnist_jax.errors import UsageError
from mnist_jax.ops.dense import NARROW

KEY = jax.random.key(0)

# (name, kind, output shape, parameters), as the tutorial's table of each network has them.
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
PARAMETERS = {"logistic": 7_850, "mlp": 244_522, "cnn": 5_259_594}


def init(model, key=KEY):
    return jax.jit(partial(models.init_params, model))(key)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 28, 28, 1), np.float32)


@pytest.mark.parametrize("name", models.MODELS)
def test_parameters_are_as_many_as_the_tutorials(name):
    params = jax.eval_shape(partial(models.init_params, models.MODELS[name]()), KEY)
    assert models.count_parameters(params) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", models.MODELS)
def test_the_table_of_layers(name):
    table = models.layers(models.MODELS[name]())
    assert [tuple(row) for row in table] == TABLES[name]
    assert sum(row.parameters for row in table) == PARAMETERS[name]


def test_the_table_follows_the_fields():
    model = models.MLP(num_classes=3, hidden_sizes=(5, 4), dropout=0.1)
    assert [tuple(row) for row in models.layers(model)] == [
        ("flatten", "Flatten", (784,), 0),
        ("dense1", "Dense", (5,), 784 * 5 + 5),
        ("dropout1", "Dropout", (5,), 0),
        ("dense2", "Dense", (4,), 5 * 4 + 4),
        ("dropout2", "Dropout", (4,), 0),
        ("logits", "Dense", (3,), 4 * 3 + 3),
    ]


@pytest.mark.parametrize("name", models.MODELS)
def test_kernels_start_glorot_uniform_and_biases_at_zero(name):
    for layer, weights in init(models.MODELS[name]()).items():
        kernel, bias = np.asarray(weights["kernel"]), np.asarray(weights["bias"])
        field = np.prod(kernel.shape[:-2])  # 9 of a convolution, 1 of a dense layer
        limit = np.sqrt(6 / (field * (kernel.shape[-2] + kernel.shape[-1])))
        largest = np.abs(kernel).max()
        assert 0.95 * limit < largest <= limit, layer
        assert np.std(kernel) == pytest.approx(limit / np.sqrt(3), rel=0.1), layer
        assert abs(np.mean(kernel)) < 4 * limit / np.sqrt(3 * kernel.size), layer
        assert not bias.any(), layer


def test_the_key_fixes_the_weights():
    first, same, other = (init(models.MLP(), jax.random.key(seed)) for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, same))
    for layer in first:
        assert not np.array_equal(first[layer]["kernel"], other[layer]["kernel"])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", models.MODELS)
def test_logits_come_out_not_probabilities(name, dtype):
    model = models.MODELS[name](dtype=dtype)
    params, x = init(model), images(3)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)({"params": params}, x)
    assert logits.shape == (3, 10)
    assert logits.dtype == (dtype or jnp.float32)
    assert np.min(logits) < 0
    assert np.all(np.abs(np.sum(np.float32(logits), -1) - 1) > 0.01)
    # Adding to the last bias adds to the logits alike: nothing follows that would squash them.
    params["logits"]["bias"] += 100
    shifted = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(shifted - logits, 100, atol=0.5 if dtype else 1e-4)


def test_an_examples_logits_do_not_depend_on_its_batch():
    model = models.MLP()
    params, x = init(model), images(5)
    together = model.apply({"params": params}, x)
    alone = [model.apply({"params": params}, x[i : i + 1])[0] for i in range(5)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_dropout_drops_its_share_when_training_and_scales_up_the_rest():
    rate, size = 0.25, 4096
    model = models.MLP(hidden_sizes=(size,), dropout=rate)
    params = {  # every hidden unit is 1, every logit their mean
        "dense1": {"kernel": jnp.zeros((784, size)), "bias": jnp.ones(size)},
        "logits": {"kernel": jnp.full((size, 10), 1 / size), "bias": jnp.zeros(10)},
    }

    def apply(train):
        return model.apply({"params": params}, images(4), train=train, rngs={"dropout": KEY})

    means = np.asarray(apply(True))[:, 0]
    assert means == pytest.approx(np.ones(4), abs=0.05)  # four standard deviations: 0.036
    assert len(set(means)) > 1  # each example has its own mask
    kept = means * size * (1 - rate)
    np.testing.assert_allclose(kept, np.round(kept), atol=0.05)  # whole units, each scaled alike
    np.testing.assert_allclose(apply(False), 1, rtol=1e-5)


def test_the_cnn_drops_half_of_both_hidden_layers():
    model = models.CNN()
    params = init(model)
    for layer in ("dense1", "dense2"):  # every unit is 1 before dropout, none dead
        params[layer] = jax.tree.map(jnp.zeros_like, params[layer])
        params[layer]["bias"] += 1

    @jax.jit
    def train(params):
        return model.apply(
            {"params": params},
            images(2),
            train=True,
            rngs={"dropout": KEY},
            capture_intermediates=lambda module, _: (module.name or "").startswith("dropout"),
        )

    _, state = train(params)
    for size, layer in ((512, "dropout1"), (256, "dropout2")):
        (output,) = state["intermediates"][layer]["__call__"]
        assert output.shape == (2, size)
        assert set(np.unique(output)) == {0, 2}
        assert abs(np.mean(output == 0) - 0.5) < 4 * 0.5 / np.sqrt(2 * size)


@pytest.mark.parametrize("features", [10, NARROW, NARROW + 1])
@pytest.mark.parametrize("batch", [(), (1,), (100,), (3, 4)])
def test_a_dense_layer_is_flax_own(features, batch):
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
        got, want = (jax.jit(partial(derivatives, layer))(params, x) for layer in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_only_a_cpu_transposes_a_narrow_kernel():
    layer = models.dense(10)
    x = jnp.ones((100, 784))
    params = jax.eval_shape(layer.init, KEY, x)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(layer.apply(params, x) ** 2)))
    for platform, transposes in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = gradient.trace(params, x).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == transposes, platform


def test_a_network_that_cannot_be_trained_is_refused_before_a_folder_is_made(
    monkeypatch, data_dir, tmp_path
):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.BatchNorm(use_running_average=not train)(x.mean((1, 2)))

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.Dense(5)(x.reshape(len(x), -1))

    for kind, message in ((Normed, "state batch_stats;.*LayerNorm"), (Narrow, r"\(1, 5\) for one")):
        odd = type("Odd", (kind,), {"__annotations__": {"dtype": object}, "dtype": None})
        monkeypatch.setitem(models.MODELS, "logistic", odd)
        config = Config(
            model="logistic", dataset="digits", data_dir=data_dir, workdir=tmp_path / "run"
        )
        with pytest.raises(UsageError, match=message):
            fit(config)
    assert not (tmp_path / "run").exists()
