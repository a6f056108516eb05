"""The CPU's 3x3 convolution and 2x2 pooling against their definitions."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from mnist_jax.models import CNN, init_params
from mnist_jax.ops import convolution
from mnist_jax.ops.convolution import conv3x3, conv_general_dilated, max_pool_2x2

NHWC = ("NHWC", "HWIO", "NHWC")

# Compiling takes longest here. This leaves XLA's own passes as they are and spares LLVM's.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}

# (height, width, in, out, padding) of the CNN's four convolutions.
CNN_LAYERS = [
    (28, 28, 1, 64, "SAME"),
    (28, 28, 64, 64, "SAME"),
    (14, 14, 64, 128, "SAME"),
    (14, 14, 128, 256, "VALID"),
]
# Sizes that no tile divides, down to a single pixel of output, and few or odd channels.
ODD_SIZES = [
    (3, 3, 2, 3, "SAME"),
    (3, 3, 2, 3, "VALID"),
    (5, 7, 3, 5, "SAME"),
    (5, 7, 3, 5, "VALID"),
    (6, 9, 1, 2, "SAME"),
    (6, 9, 1, 2, "VALID"),
    (9, 6, 7, 1, "SAME"),
    (4, 13, 2, 4, "VALID"),
]


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        yield


def definition(x: np.ndarray, w: np.ndarray, g: np.ndarray, padding: str) -> list[np.ndarray]:
    """The convolution and both gradients for the output's cotangent `g`, in float64."""
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


def ours(x, w, g, padding: str, convolve=conv3x3) -> list[jax.Array]:
    y, backward = jax.vjp(lambda x, w: convolve(x, w, padding=padding), x, w)
    return [y, *backward(g)]


def make_steps(padding: str):
    return jax.jit(partial(ours, padding=padding), compiler_options=QUICKLY_COMPILED)


def make_case(batch, height, width, channels, features, padding, dtype="float32"):
    """Seeded normal images, kernel and cotangent."""
    rng = np.random.default_rng([batch, height, width, channels, features])
    smaller = 0 if padding == "SAME" else 2
    shapes = (
        (batch, height, width, channels),
        (3, 3, channels, features),
        (batch, height - smaller, width - smaller, features),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def relative_errors(results, expected) -> dict[str, float]:
    assert [a.shape for a in results] == [a.shape for a in expected]
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
        for name, a, b in zip(("y", "dx", "dw"), results, expected, strict=True)
    }


def test_the_definition_is_xlas():
    for padding in ("SAME", "VALID"):
        x, w, g = make_case(2, 5, 7, 3, 5, padding, "float64")
        with jax.enable_x64(True):
            direct = partial(
                lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=NHWC
            )
            errors = relative_errors(ours(x, w, g, padding, direct), definition(x, w, g, padding))
        assert max(errors.values()) < 1e-14


# Bounds are five times what was measured: 3e-6 in float32, where the transforms round about ten
# times as much as the definition, and 5e-15 in float64.
@pytest.mark.parametrize(
    ("dtype", "batch", "bound"),
    [("float32", 1, 1.5e-5), ("float32", 3, 1.5e-5), ("float64", 3, 2.5e-14)],
)
@pytest.mark.parametrize("shape", [*CNN_LAYERS, *ODD_SIZES], ids=str)
def test_value_and_gradients_equal_the_definition(shape, dtype, batch, bound):
    *_, padding = shape
    case = make_case(batch, *shape, dtype=dtype)
    as_users_run_it = shape in CNN_LAYERS and dtype == "float32"
    options = None if as_users_run_it else QUICKLY_COMPILED
    with jax.enable_x64(dtype == "float64"):
        results = jax.jit(partial(ours, padding=padding), compiler_options=options)(*case)
    assert all(a.dtype == dtype for a in results)
    errors = relative_errors(results, definition(*case, padding))
    assert max(errors.values()) < bound, errors


def test_half_precision_goes_in_and_comes_out_and_loses_only_its_own_rounding():
    case = [jnp.asarray(a, jnp.bfloat16) for a in make_case(3, 14, 14, 64, 32, "SAME")]
    results = make_steps("SAME")(*case)
    assert all(a.dtype == jnp.bfloat16 for a in results)
    errors = relative_errors(results, definition(*case, "SAME"))
    assert max(errors.values()) < 2**-8, errors  # bfloat16 has 8 bits


def impulses() -> list[np.ndarray]:
    """An image for each pixel where only it is 1, and the like for the cotangent."""
    x, w, g = make_case(2 * 7 * 9, 7, 9, 2, 3, "SAME")
    x[:63, ..., 0] = np.eye(63).reshape(63, 7, 9)
    x[:63, ..., 1] = 0
    g[63:] = np.eye(63).reshape(63, 7, 9, 1)
    return [x, w, g]


def large_offset() -> list[np.ndarray]:
    x, w, g = make_case(3, 14, 10, 16, 8, "SAME")
    return [x + 1000, w, g + 1000]


def large_offset_that_the_kernel_cancels() -> list[np.ndarray]:
    x, w, g = large_offset()
    return [x, w - w.mean((0, 1), keepdims=True), g]


def alternating() -> list[np.ndarray]:
    """The interpolation points ±1 and ±2 make patterns like this the largest in the transforms."""
    x, w, g = make_case(3, 14, 10, 16, 8, "SAME")
    sign = (-1.0) ** np.add.outer(np.arange(14), np.arange(10))[:, :, None]
    return [a.astype(np.float32) for a in (1000 * sign + 0 * x, w, 1000 * sign + 0 * g)]


def channels_of_unlike_scale() -> list[np.ndarray]:
    x, w, g = make_case(3, 14, 10, 16, 8, "SAME")
    scale = np.logspace(-6, 6, 16, dtype=np.float32)
    return [x * scale, w / scale[:, None], g]


@pytest.mark.parametrize(
    "make",
    [
        impulses,
        large_offset,
        large_offset_that_the_kernel_cancels,
        alternating,
        channels_of_unlike_scale,
    ],
)
def test_adversarial_inputs_round_no_worse(make):
    """Errors against the sum of the absolute values of all products, which bounds the definition's
    own rounding where its products cancel."""
    case = make()
    results, expected = make_steps("SAME")(*case), definition(*case, "SAME")
    scales = definition(*map(np.abs, case), "SAME")
    for name, a, b, scale in zip(("y", "dx", "dw"), results, expected, scales, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(scale)
        assert error < 1.5e-6, name


def test_images_and_cotangents_of_zeros_give_exact_zeros():
    x, w, g = make_case(2, 7, 9, 2, 3, "SAME")
    y, _, dw = make_steps("SAME")(x * 0, w, g)
    assert not np.any(y)
    assert not np.any(dw)
    _, dx, dw = make_steps("SAME")(x, w, g * 0)
    assert not np.any(dx)
    assert not np.any(dw)


def test_vmap_over_kernels_equals_one_at_a_time():
    """An ensemble's members see the same images in the first layer and their own after it."""
    x, w, g = make_case(3, 5, 7, 2, 3, "VALID")
    rng = np.random.default_rng(0)
    ws, gs, xs = (rng.standard_normal((4, *a.shape)).astype(np.float32) for a in (w, g, x))
    one = make_steps("VALID")
    for images, in_axes in ((x, (None, 0, 0)), (xs, (0, 0, 0))):
        together = jax.jit(
            jax.vmap(partial(ours, padding="VALID"), in_axes), compiler_options=QUICKLY_COMPILED
        )(images, ws, gs)
        for k in range(4):
            alone = one(x if images is x else xs[k], ws[k], gs[k])
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-5)


def test_elsewhere_the_gradients_of_many_networks_are_those_of_a_grouped_convolution():
    """Which the compiler for GPUs knows as a sum over images; its batch groups are the networks."""
    x, w, g = make_case(3, 5, 7, 2, 3, "VALID")
    rng = np.random.default_rng(0)
    ws, gs, xs = (rng.standard_normal((4, *a.shape)).astype(np.float32) for a in (w, g, x))
    gradients = partial(convolution._direct_gradients, padding="VALID", precision="highest")
    for images, in_axes in ((x, (None, 0, 0)), (xs, (0, 0, 0))):
        together = jax.jit(jax.vmap(gradients, in_axes))(images, ws, gs)
        for k in range(4):
            alone = gradients(x if images is x else xs[k], ws[k], gs[k])
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[k], b, rtol=1e-5, atol=1e-5)
    many = jax.jit(jax.vmap(partial(ours, padding="VALID")))
    text = export.export(many, platforms=["cuda"])(xs, ws, gs).mlir_module()
    assert text.count("stablehlo.convolution") == 3
    assert text.count("batch_group_count = 4") == 1
    assert text.count("feature_group_count = 4") == 2


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_a_served_convolution_is_conv3x3(padding):
    x, w, g = make_case(2, 6, 9, 2, 3, padding)

    def convolve(x, w, padding):
        return conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC)

    ours_text = str(jax.make_jaxpr(partial(ours, padding=padding))(x, w, g))
    through = partial(ours, padding=padding, convolve=convolve)
    assert str(jax.make_jaxpr(through)(x, w, g)) == ours_text


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 4, 6), {"window_strides": (2, 2)}),
        ((3, 3, 4, 6), {"window_strides": (1, 2)}),
        ((3, 3, 4, 6), {"rhs_dilation": (2, 2)}),
        ((3, 3, 2, 6), {"feature_group_count": 2}),
        ((5, 5, 4, 6), {}),
        ((1, 1, 4, 6), {}),
        ((3, 5, 4, 6), {}),
        ((3, 3, 4, 6), {"padding": ((2, 0), (1, 1))}),
        ((3, 3, 8, 6), {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
        ((3, 4, 3, 6), {"dimension_numbers": ("NHWC", "HIWO", "NHWC")}),
    ],
    ids=str,
)
def test_what_is_not_served_is_xlas_own(kernel, options):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 9, 4)).astype(np.float32)
    w = rng.standard_normal(kernel).astype(np.float32)
    arguments = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": NHWC,
    } | options

    def value_and_gradients(convolve, x, w):
        y, backward = jax.vjp(partial(convolve, **arguments), x, w)
        return y, *backward(jnp.cos(y))

    expected = jax.jit(partial(value_and_gradients, lax.conv_general_dilated))(x, w)
    results = jax.jit(partial(value_and_gradients, conv_general_dilated))(x, w)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_transposed_convolution_is_refused_by_xla_not_served_as_a_plain_one():
    x, w, _ = make_case(2, 8, 9, 3, 4, "SAME")
    with pytest.raises(ValueError, match="transposed"):
        conv_general_dilated(x, w, (1, 1), "SAME", lhs_dilation=(2, 1), dimension_numbers=NHWC)


def test_an_image_smaller_than_the_kernel_is_xlas_own():
    x, w, _ = make_case(2, 2, 2, 3, 4, "SAME")
    arguments = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
    expected = lax.conv_general_dilated(x, w, **arguments)
    np.testing.assert_array_equal(conv_general_dilated(x, w, **arguments), expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("shape", CNN_LAYERS, ids=str)
def test_a_cpu_convolves_by_products_and_others_by_one_convolution_each(shape, platform):
    *_, padding = shape
    function = jax.jit(partial(ours, padding=padding))
    exported = export.export(function, platforms=[platform])(*make_case(2, *shape))
    convolutions = exported.mlir_module().count("stablehlo.convolution")
    assert convolutions == (0 if platform == "cpu" else 3)  # the value, dx and dw


def test_a_program_for_all_platforms_computes_the_same():
    case = make_case(2, 5, 7, 3, 4, "SAME")
    function = jax.jit(partial(ours, padding="SAME"))
    exported = export.export(function, platforms=["cpu", "cuda", "tpu"])(*case)
    for a, b in zip(exported.call(*case), make_steps("SAME")(*case), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_cnn_uses_it_in_every_layer(platform):
    model = CNN()
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))

    def loss(params, x):
        return model.apply({"params": params}, x).sum()

    exported = export.export(jax.jit(jax.grad(loss)), platforms=[platform])(
        params, jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    )
    # Elsewhere: the value and the kernel's gradient of each, the input's of all but the first.
    convolutions = exported.mlir_module().count("stablehlo.convolution")
    assert convolutions == (0 if platform == "cpu" else 4 + 4 + 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(2, 2), (6, 8), (28, 28)])
def test_pooling_equals_a_window_reduction(size, dtype):
    x = np.random.default_rng(0).standard_normal((3, *size, 5))
    x = jnp.asarray(x, dtype)
    expected = nn.max_pool(x, (2, 2), (2, 2))
    assert max_pool_2x2(x).dtype == expected.dtype
    np.testing.assert_array_equal(max_pool_2x2(x), expected)


def test_of_equal_pixels_the_first_in_reading_order_gets_the_gradient():
    """All 15 ways in which pixels of a window can share its maximum, a channel each."""
    shared = np.array([[n >> k & 1 for k in range(4)] for n in range(1, 16)], np.float32)
    x = shared.T.reshape(1, 2, 2, 15)
    gradient = jax.grad(lambda x: max_pool_2x2(x).sum())(x)
    first = np.eye(4)[shared.argmax(1)]
    np.testing.assert_array_equal(gradient, first.T.reshape(1, 2, 2, 15))


def test_pooling_drops_an_odd_last_row_and_column():
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    x[:, 4], x[:, :, 6] = 100, 100
    pooled, backward = jax.vjp(max_pool_2x2, x)
    np.testing.assert_array_equal(pooled, nn.max_pool(x[:, :4, :6], (2, 2), (2, 2)))
    (gradient,) = backward(jnp.ones_like(pooled))
    assert gradient.shape == x.shape
    assert np.sum(gradient) == pooled.size
    assert not gradient[:, 4].any()
    assert not gradient[:, :, 6].any()
