"""The 3×3 convolution and the 2×2 pooling against their definitions."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from mnist_jax.models import CNN, variable_shapes
from mnist_jax.ops.convolution import conv3x3, conv_general_dilated
from mnist_jax.ops.dense import dot_general
from mnist_jax.ops.pooling import max_pool_2x2

NHWC = ("NHWC", "HWIO", "NHWC")
ARGUMENTS = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}  # skips LLVM's passes, not XLA's

# (height, width, in, out, padding). Sizes that no tile divides, down to one pixel of output.
ODD_SIZES = [(3, 3, 2, 3, "VALID"), (5, 7, 3, 5, "SAME")]
ODD_SIZES += [(6, 9, 1, 2, "SAME"), (4, 13, 2, 4, "VALID")]
CNN_LAYERS = [(28, 28, 1, 64, "SAME"), (28, 28, 64, 64, "SAME")]
CNN_LAYERS += [(14, 14, 64, 128, "SAME"), (14, 14, 128, 256, "VALID")]


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        yield


def definition(x: np.ndarray, w: np.ndarray, g: np.ndarray, padding: str) -> list[np.ndarray]:
    """The output and both gradients for its cotangent `g`, in float64."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    border = 1 if padding == "SAME" else 0
    x = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    height, width = g.shape[1:3]
    for i in range(3):
        for j in range(3):
            window = slice(None), slice(i, i + height), slice(j, j + width)
            y += x[window] @ w[i, j]
            dx[window] += g @ w[i, j].T
            dw[i, j] = np.tensordot(x[window], g, ((0, 1, 2), (0, 1, 2)))
    return [y, dx[:, border : x.shape[1] - border, border : x.shape[2] - border], dw]


def outputs(x, w, g, padding: str) -> list[jax.Array]:
    y, backward = jax.vjp(lambda x, w: conv3x3(x, w, padding), x, w)
    return [y, *backward(g)]


@functools.cache
def compiled(padding: str):
    return jax.jit(partial(outputs, padding=padding), compiler_options=QUICKLY_COMPILED)


def make_case(batch, height, width, channels, features, padding, dtype="float32"):
    rng = np.random.default_rng([batch, height, width, channels, features])
    images, kernel = (batch, height, width, channels), (3, 3, channels, features)
    smaller = 0 if padding == "SAME" else 2
    outputs = batch, height - smaller, width - smaller, features
    return [rng.standard_normal(shape).astype(dtype) for shape in (images, kernel, outputs)]


def largest_error(results, expected, scales=None) -> float:
    """Relative to the norm of what is expected, or of `scales`."""
    assert [a.shape for a in results] == [a.shape for a in expected]
    triples = zip(results, expected, scales or expected, strict=True)
    norm = np.linalg.norm
    return max(float(norm(np.asarray(a, np.float64) - b) / norm(c)) for a, b, c in triples)


# Bounds are five times what was measured: 3e-6 in float32, 5e-15 in float64.
BOUNDS = {"float32": 1.5e-5, "float64": 2.5e-14, "bfloat16": 2**-8}


@pytest.mark.parametrize(
    ("shape", "dtype", "batch"),
    [
        *((shape, "float64", 3) for shape in ODD_SIZES),
        ((14, 14, 16, 8, "SAME"), "float32", 3),
        ((14, 14, 16, 8, "SAME"), "bfloat16", 3),
        *(
            pytest.param(shape, dtype, batch, marks=pytest.mark.campaign)
            for shape in (*CNN_LAYERS, *ODD_SIZES)
            for dtype, batch in (("float32", 1), ("float32", 3), ("float64", 3))
        ),
    ],
    ids=str,
)
def test_value_and_gradients_equal_the_definition(shape, dtype, batch):
    *_, padding = shape
    with jax.enable_x64(dtype == "float64"):
        case = [jnp.asarray(a, dtype) for a in make_case(batch, *shape, dtype="float64")]
        results = compiled(padding)(*case)
    assert all(a.dtype == dtype for a in results)
    assert largest_error(results, definition(*case, padding)) < BOUNDS[dtype]


def test_it_can_be_differentiated_twice():
    x, w, _ = make_case(2, 6, 5, 3, 4, "SAME")

    def penalty(convolve, x, w):  # of the gradient's norm
        return jnp.sum(jax.grad(lambda x: jnp.sum(convolve(x, w) ** 3))(x) ** 2)

    both = partial(conv3x3, padding="SAME"), partial(lax.conv_general_dilated, **ARGUMENTS)
    found, wanted = (jax.jit(jax.grad(partial(penalty, f), 1))(x, w) for f in both)
    assert largest_error([found], [wanted]) < 1e-4


def adversarial() -> dict[str, list[np.ndarray]]:
    # Images with a single 1, one for each pixel, and the same for the cotangent.
    impulses = make_case(2 * 7 * 9, 7, 9, 2, 3, "SAME")
    impulses[0][:63, ..., 0] = np.eye(63).reshape(63, 7, 9)
    impulses[0][:63, ..., 1] = 0
    impulses[2][63:] = np.eye(63).reshape(63, 7, 9, 1)
    x, w, g = make_case(3, 14, 10, 16, 8, "SAME")
    # The interpolation points ±1 and ±2 make this pattern the largest in the transforms.
    sign = (-1.0) ** np.add.outer(np.arange(14), np.arange(10))[:, :, None]
    scale = np.logspace(-6, 6, 16)
    cases = {
        "impulses": impulses,
        "large offset": [x + 1000, w, g + 1000],
        "cancelled offset": [x + 1000, w - w.mean((0, 1), keepdims=True), g + 1000],
        "alternating": [1000 * sign + 0 * x, w, 1000 * sign + 0 * g],
        "unequal channels": [x * scale, w / scale[:, None], g],
    }
    return {name: [a.astype(np.float32) for a in case] for name, case in cases.items()}


@pytest.mark.parametrize("name", adversarial())
def test_adversarial_inputs_have_no_larger_errors(name):
    """Relative to the sum of the products' absolute values, which bounds the rounding errors."""
    case = adversarial()[name]
    scales = definition(*map(np.abs, case), "SAME")
    assert largest_error(compiled("SAME")(*case), definition(*case, "SAME"), scales) < 1.5e-6


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("shared_images", [True, False])
@pytest.mark.parametrize("channels", [1, 2])
def test_vmap_equals_one_at_a_time(channels, shared_images, platform):
    shape = 3, 5, 7, channels, 3, "VALID"
    x, w, g = (np.stack(a) for a in zip(*(make_case(*shape) for _ in range(4)), strict=True))
    w, g = (a * np.arange(1, 5).reshape(4, *[1] * (a.ndim - 1)) for a in (w, g))
    x, axis = (x[0], None) if shared_images else (x[::-1] * 0.5, 0)
    function = jax.vmap(partial(outputs, padding="VALID"), (axis, 0, 0))
    run = jax.jit(function, compiler_options=QUICKLY_COMPILED)
    if platform == "gpu":  # the program that is compiled for a GPU, on this CPU
        checks = [export.DisabledSafetyCheck.platform()]
        run = export.export(run, platforms=["cuda"], disabled_checks=checks)(x, w, g).call
    results = run(x, w, g)
    for k in range(4):
        expected = definition(x if shared_images else x[k], w[k], g[k], "VALID")
        assert largest_error([a[k] for a in results], expected) < 1e-5


@pytest.mark.parametrize("channels", [1, 2])
def test_on_a_gpu_the_convolutions_of_several_networks_have_no_groups(channels):
    many = [jnp.stack([a] * 4) for a in make_case(3, 5, 7, channels, 3, "VALID")]
    function = jax.jit(jax.vmap(partial(outputs, padding="VALID")))
    text = function.trace(*many).lower(lowering_platforms=("cuda",)).as_text()
    found = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert found and all("count = 1 : i64, feature_group_count = 1 " in line for line in found)


def lowered(convolve, x, w, **arguments) -> str:
    def loss(x, w):
        return jnp.sum(jnp.cos(convolve(x, w, **arguments)))

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).as_text()


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((2, 8, 9, 4), (3, 3, 4, 6), {"window_strides": (2, 2)}),
        ((2, 8, 9, 4), (3, 3, 4, 6), {"window_strides": (1, 2)}),
        ((2, 8, 9, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 2)}),
        ((2, 8, 9, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
        ((2, 8, 9, 4), (3, 3, 4, 6), {"batch_group_count": 2}),
        ((2, 8, 9, 4), (3, 3, 4, 6), {"preferred_element_type": jnp.float32}),
        ((2, 8, 9, 4), (5, 5, 4, 6), {}),
        ((2, 8, 9, 4), (3, 3, 4, 6), {"padding": ((2, 0), (1, 1))}),
        ((2, 8, 9, 4), (3, 3, 8, 6), {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
        ((2, 8, 9, 4), (3, 4, 3, 6), {"dimension_numbers": ("NHWC", "HIWO", "NHWC")}),
        ((2, 2, 2, 3), (3, 3, 3, 4), {}),
    ],
    ids=str,
)
def test_other_convolutions_are_xlas_own(images, kernel, options):
    x, w, arguments = jnp.zeros(images), jnp.zeros(kernel), ARGUMENTS | options
    xlas = lowered(lax.conv_general_dilated, x, w, **arguments)
    assert lowered(conv_general_dilated, x, w, **arguments) == xlas


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_cnn_uses_it_in_every_layer(platform):
    def loss(params, x):
        return CNN().apply({"params": params}, x).sum()

    image = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    exported = export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    text = exported(variable_shapes(CNN())[0], image).mlir_module()
    # On a GPU: the output and two gradients of each but the first, whose one channel is summed.
    assert text.count("stablehlo.convolution") == (0 if platform == "cpu" else 3 * 3)


@pytest.mark.parametrize(("size", "dtype"), [((5, 7), "float32"), ((6, 8), "bfloat16")])
def test_pooling_equals_a_window_reduction(size, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, *size, 5)), dtype)
    pooled, backward = jax.vjp(max_pool_2x2, x)
    expected, theirs = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    assert pooled.dtype == expected.dtype
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(*(f(jnp.ones_like(pooled))[0] for f in (backward, theirs)))


def test_dense_layers_leave_products_over_other_axes_to_xla():
    x, over_rows = np.arange(25, dtype=np.float32).reshape(5, 5), (((0,), (0,)), ((), ()))
    np.testing.assert_array_equal(dot_general(x, x, over_rows), lax.dot_general(x, x, over_rows))
