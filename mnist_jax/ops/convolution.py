"""The 3×3 convolution: Winograd's on a CPU, XLA's elsewhere; one channel is summed on CPU and CUDA.

XLA's CPU convolutions are slow in training, above all the gradient of the kernel and anything in a
loop. Its matrix products are fast, and `winograd` turns a convolution into them.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mnist_jax.ops import winograd

NHWC = ("NHWC", "HWIO", "NHWC")
BORDER = {"SAME": 1, "VALID": 0}  # zeros on each side of an image


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, by `conv3x3` for the shapes that it supports.

    For `flax.linen.Conv(..., conv_general_dilated=conv_general_dilated)`. Supported are NHWC images
    of floats with 3×3 HWIO kernels, stride 1, no dilation, no groups and padding SAME or VALID; XLA
    computes everything else.
    """
    dilations = options.get("lhs_dilation") or (), options.get("rhs_dilation") or ()
    supported = (
        lhs.ndim == 4
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and rhs.shape[:3] == (3, 3, lhs.shape[3])
        and padding in ("SAME", "VALID")
        and min(lhs.shape[1:3]) >= 3
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and options.get("preferred_element_type") is None
        and all(n == 1 for n in (*window_strides, *dilations[0], *dilations[1]))
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, options.get("dimension_numbers"))
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    )
    if supported:
        return conv3x3(lhs, rhs, padding, options.get("precision"))
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


# custom_vjp is outermost and the platform dispatch inside it: differentiating through
# `platform_dependent` would keep the residuals of every branch.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv3x3(
    x: jax.Array, w: jax.Array, padding: str, precision: lax.PrecisionLike = None
) -> jax.Array:
    """A 3×3 convolution (cross-correlation, as usual in deep learning) of stride 1.

    Args:
        x: images, (batch, height, width, in).
        w: kernel, (3, 3, in, out).
        padding: 'SAME' (the output has the input's size) or 'VALID' (two pixels less).
        precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        (batch, height, width, out), or with 'VALID' (batch, height - 2, width - 2, out).
    """
    options = {"border": BORDER[padding], "precision": precision}
    cpu, cuda = partial(_on_cpu, **options), partial(_on_cuda, **options)
    return lax.platform_dependent(x, w, cpu=cpu, cuda=cuda, default=partial(_direct, **options))


def _forward(x, w, padding, precision):
    options = {"border": BORDER[padding], "precision": precision}
    cpu, default = partial(_on_cpu, **options), partial(_direct, **options)

    def cuda(x, w):
        # The barrier keeps XLA from fusing the bias into cuDNN's convolution: then a kernel of its
        # own would copy each bias out of the loop's carry first. The activation adds it for free.
        y = _on_cuda(x, w, **options)
        return y if x.shape[3] == 1 else lax.optimization_barrier(y)

    return lax.platform_dependent(x, w, cpu=cpu, cuda=cuda, default=default), (x, w)


def _backward(padding, precision, residuals, g):
    x, w = residuals
    options = {"border": BORDER[padding], "precision": precision}
    cpu, default = partial(_gradients_on_cpu, **options), partial(_direct_gradients, **options)

    def cuda(x, w, g):
        dx, dw = default(x, w, g)
        if x.shape[3] == 1:
            dw = _one_channel_dw(_bordered(x, BORDER[padding]), g, precision)
        return dx, dw

    return lax.platform_dependent(x, w, g, cpu=cpu, cuda=cuda, default=default)


conv3x3.defvjp(_forward, _backward)


def _on_cuda(x, w, border, precision):
    """cuDNN's convolution; it is slow at one channel, which is summed up instead."""
    if x.shape[3] == 1:
        return _one_channel(_wide(_bordered(x, border)), _wide(w)).astype(x.dtype)
    return _direct(x, w, border, precision)


def _direct(x, w, border, precision):
    """XLA's own convolution."""
    return _one_by_one(partial(_convolution, border=border, precision=precision))(x, w)


def _direct_gradients(x, w, g, border, precision):
    """XLA's own gradients, for which GPUs have routines."""
    convolve = partial(_convolution, border=border, precision=precision)
    return _one_by_one(lambda x, w, g: jax.vjp(convolve, x, w)[1](g))(x, w, g)


def _one_by_one(function):
    """The function; under `jax.vmap` over all its arguments it is called for each element.

    `jax.vmap` of convolutions with a kernel each is one with groups of channels. On an H200 cuDNN
    computes the groups one after the other, from copies, and by slower kernels than without groups.
    """
    one = jax.custom_batching.custom_vmap(function)

    @one.def_vmap
    def many(size, batched, *arrays):
        if batched in ([True, False], [False, True]):  # shared images or kernels need no groups
            return jax.vmap(function, [0 if b else None for b in batched])(*arrays), True
        pairs = [*zip(arrays, batched, strict=True)]
        outputs = [one(*(x[i] if b else x for x, b in pairs)) for i in range(size)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return stacked, jax.tree.map(lambda _: True, stacked)

    twice = jax.custom_jvp(one)  # under `jax.jit`, JAX cannot differentiate a `custom_vmap`
    twice.defjvp(lambda x, dx: (one(*x), jax.jvp(function, x, dx)[1]))
    return twice


def _convolution(x, w, border, precision):
    pads = [(border, border)] * 2
    return lax.conv_general_dilated(x, w, (1, 1), pads, dimension_numbers=NHWC, precision=precision)


def _bordered(x, border):
    """x with zeros on each side, which a GPU adds while it reads x."""
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))


def _on_cpu(x, w, border, precision):
    dtype = x.dtype
    x, w = _wide(x), _wide(w)
    if x.shape[3] == 1:
        y = _one_channel(winograd.pad(x, [(border, border)] * 2), w)
    else:
        y = winograd.convolution(x, w, border, precision)
    return y.astype(dtype)


def _gradients_on_cpu(x, w, g, border, precision):
    dtype = x.dtype
    x, w, g = _wide(x), _wide(w), _wide(g)
    d = winograd.gradient_tiles(g)
    dx = winograd.input_gradient(d, w, x.shape, border, precision)
    if x.shape[3] == 1:
        pixels = jnp.stack(_window_pixels(winograd.pad(x, [(border, border)] * 2)))
        pixels = pixels[..., 0]  # (9, batch, height, width)
        dw = lax.dot_general(pixels, g, (((1, 2, 3), (0, 1, 2)), ((), ())), precision)
        dw = dw.reshape(3, 3, 1, -1)
    else:
        dw = winograd.kernel_gradient(d, x, border, precision)
    return dx.astype(dtype), dw.astype(dtype)


def _wide(x):
    """Half precisions to float32, because the transforms would lose too many of their bits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _one_channel(x, w):
    """The definition as one fused sum: a single input channel leaves no matrix product."""
    pairs = zip(_window_pixels(x), w.reshape(9, -1), strict=True)
    return reduce(jnp.add, [pixel * k for pixel, k in pairs])


def _one_channel_dw(x, g, precision):
    """The kernel's gradient: one product for each image, which a GPU computes at once, summed."""
    windows = jnp.concatenate(_window_pixels(x), axis=-1)  # (batch, height, width, 9)
    numbers, dtype = (((1, 2), (1, 2)), ((0,), (0,))), jnp.promote_types(x.dtype, jnp.float32)
    dw = lax.dot_general(windows, g, numbers, precision, preferred_element_type=dtype)
    return jnp.sum(dw, axis=0).reshape(3, 3, 1, -1).astype(x.dtype)


def _window_pixels(x):
    """Each of the 9 pixels of the windows of the padded x: 9 × (batch, height, width, channels)."""
    height, width = (n - 2 for n in x.shape[1:3])
    return [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
