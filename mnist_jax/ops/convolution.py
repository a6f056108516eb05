"""The 3×3 convolution: XLA's on GPU and TPU, Winograd's on a CPU; a plain sum for one channel.

XLA's CPU convolutions are slow in training, above all the gradient of the kernel and anything in a
loop. Its matrix products are fast, and Winograd's minimal filtering F(4×4, 3×3) [1] turns a
convolution into them. It computes a 4×4 tile of the output from a 6×6 input tile d, with 36
multiplications instead of 144:

    y = Aᵀ [ (G w Gᵀ) ⊙ (Bᵀ d B) ] A

Summed over input channels, each of the 36 elements of ⊙ is a matrix product: (tiles of the whole
batch × in) @ (in × out). The 36 are a list of 6 arrays (6, …), one per row, because a row fits the
cache and all 36 do not. A, B and G come from polynomial interpolation at 0, ±1, ±2 and ∞. The
formula is exact; float32 rounding errors are about ten times those of the definition. The gradients
are the transposed formula. With D = A g Aᵀ for each tile of the output's gradient g:

    dd = B [ (G w Gᵀ) ⊙ D ] Bᵀ, summed where tiles overlap
    dw = Gᵀ [ Σ over tiles (Bᵀ d B) ⊙ D ] G

[1] A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015,
    arXiv:1509.09308. Matrices for F(4×4, 3×3): section 4.3.
"""

import itertools
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 4  # outputs along one side of a tile
SPAN = TILE + 2  # inputs along one side
NHWC = ("NHWC", "HWIO", "NHWC")

# fmt: off
B_T = np.array([
    [4,  0, -5,  0, 1, 0],
    [0, -4, -4,  1, 1, 0],
    [0,  4, -4, -1, 1, 0],
    [0, -2, -1,  2, 1, 0],
    [0,  2, -1, -2, 1, 0],
    [0,  4,  0, -5, 0, 1],
])
G = np.array([
    [ 1 / 4,       0,      0],
    [-1 / 6,  -1 / 6, -1 / 6],
    [-1 / 6,   1 / 6, -1 / 6],
    [1 / 24,  1 / 12,  1 / 6],
    [1 / 24, -1 / 12,  1 / 6],
    [     0,       0,      1],
])
A_T = np.array([
    [1, 1,  1, 1,  1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1,  1, 4,  4, 0],
    [0, 1, -1, 8, -8, 1],
])
# fmt: on


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, by `conv3x3` for the shapes that it supports.

    For `flax.linen.Conv(..., conv_general_dilated=conv_general_dilated)`. Supported are NHWC images
    with 3×3 HWIO kernels, stride 1, no dilation, no groups and padding SAME or VALID; XLA computes
    everything else.
    """
    dilations = options.get("lhs_dilation") or (), options.get("rhs_dilation") or ()
    supported = (
        lhs.ndim == 4
        and rhs.shape[:2] == (3, 3)
        and padding in ("SAME", "VALID")
        and min(lhs.shape[1:3]) >= 3
        and options.get("feature_group_count", 1) == options.get("batch_group_count", 1) == 1
        and options.get("preferred_element_type") is None
        and all(n == 1 for n in itertools.chain(window_strides, *dilations))
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
    options = {"padding": padding, "precision": precision}
    cpu, cuda = partial(_on_cpu, **options), partial(_on_cuda, **options)
    return lax.platform_dependent(x, w, cpu=cpu, cuda=cuda, default=partial(_direct, **options))


def _forward(x, w, padding, precision):
    options = {"padding": padding, "precision": precision}
    cpu, default = partial(_on_cpu, **options), partial(_direct, **options)

    def cuda(x, w):
        # The barrier keeps XLA from fusing the bias into cuDNN's convolution: then a kernel of its
        # own would copy each bias out of the loop's carry first. The activation adds it for free.
        y = _on_cuda(x, w, **options)
        return y if x.shape[3] == 1 else lax.optimization_barrier(y)

    return lax.platform_dependent(x, w, cpu=cpu, cuda=cuda, default=default), (x, w)


def _backward(padding, precision, residuals, g):
    x, w = residuals
    options = {"padding": padding, "precision": precision}
    cpu, default = partial(_gradients_on_cpu, **options), partial(_direct_gradients, **options)

    def cuda(x, w, g):
        dx, dw = default(x, w, g)
        return dx, _one_channel_dw(_bordered(x, padding), g, precision) if x.shape[3] == 1 else dw

    return lax.platform_dependent(x, w, g, cpu=cpu, cuda=cuda, default=default)


conv3x3.defvjp(_forward, _backward)


def _on_cuda(x, w, padding, precision):
    """cuDNN's convolution; it is slow at one channel, which is summed up instead."""
    if x.shape[3] == 1:
        return _one_channel(_wide(_bordered(x, padding)), _wide(w)).astype(x.dtype)
    return _direct(x, w, padding, precision)


def _direct(x, w, padding, precision):
    """XLA's own convolution."""
    return _one_by_one(partial(_convolution, padding=padding, precision=precision))(x, w)


def _direct_gradients(x, w, g, padding, precision):
    """XLA's own gradients, for which GPUs have routines."""
    convolve = partial(_convolution, padding=padding, precision=precision)
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

    return one


def _convolution(x, w, padding, precision):
    return lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=NHWC, precision=precision
    )


def _border(padding):
    """How many zeros `conv3x3` adds on each side."""
    return 1 if padding == "SAME" else 0


def _bordered(x, padding):
    """x with these zeros, which a GPU adds while it reads x."""
    border = _border(padding)
    return jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))


def _on_cpu(x, w, padding, precision):
    dtype = x.dtype
    x, w = _wide(x), _wide(w)
    border = _border(padding)
    if x.shape[3] == 1:
        y = _one_channel(_pad(x, [(border, border)] * 2), w)
    else:
        y = _winograd(x, w, border, precision)
    return y.astype(dtype)


def _gradients_on_cpu(x, w, g, padding, precision):
    dtype = x.dtype
    x, w, g = _wide(x), _wide(w), _wide(g)
    border = _border(padding)
    d = _transform_tiles(g, A_T.T, [(0, -n % TILE) for n in g.shape[1:3]])
    dx = _winograd_dx(d, w, x.shape, border, precision)
    if x.shape[3] == 1:
        pixels = jnp.stack(_window_pixels(_pad(x, [(border, border)] * 2)))
        pixels = pixels[..., 0]  # (9, batch, height, width)
        dw = lax.dot_general(pixels, g, (((1, 2, 3), (0, 1, 2)), ((), ())), precision)
        dw = dw.reshape(3, 3, 1, -1)
    else:
        dw = jnp.stack(_products(_input_tiles(x, border), d, 1, precision))
        dw = _transform_kernel(dw, G.T)
    return dx.astype(dtype), dw.astype(dtype)


def _wide(x):
    """Half precisions to float32, because the transforms would lose too many of their bits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _winograd(x, w, border, precision):
    """The convolution with w of x, padded by `border` zeros on each side."""
    batch, height, width, _ = x.shape
    height, width = height + 2 * border - 2, width + 2 * border - 2
    rows, columns = _tiles(height), _tiles(width)
    u = _transform_kernel(w, G)  # (6, 6, in, out)
    m = _products(_input_tiles(x, border), u, 2, precision)
    m = [row.reshape(SPAN, batch, rows, columns, -1) for row in m]
    y = [lax.optimization_barrier(line) for line in _combine(A_T, m)]  # 4 × (6, b, r, c, out)
    y = [lax.optimization_barrier(jnp.stack(_combine(A_T, line), 3)) for line in y]
    y = jnp.stack(y, 2)  # (batch, rows, 4, columns, 4, out)
    return y.reshape(batch, rows * TILE, columns * TILE, -1)[:, :height, :width]


def _winograd_dx(d, w, shape, border, precision):
    """The input's gradient: B [ (G w Gᵀ) ⊙ D ] Bᵀ of each tile, summed where tiles overlap.

    d holds D = A g Aᵀ, 6 × (6, batch · rows · columns, out); `shape` is the input's.
    """
    batch, height, width, _ = shape
    rows, columns = (_tiles(n + 2 * border - 2) for n in (height, width))
    u = jnp.swapaxes(_transform_kernel(w, G), 2, 3)  # (6, 6, out, in)
    m = _products(d, u, 2, precision)
    m = [row.reshape(SPAN, batch, rows, columns, -1) for row in m]
    dx = _overlap_add(_combine(B_T.T, m), 2)  # (6, batch, 4 (rows + 1), columns, in)
    dx = lax.optimization_barrier(dx[:, :, border : border + height])
    return _overlap_add(_combine(B_T.T, dx), 2)[:, :, border : border + width]


def _overlap_add(lines, axis):
    """Sums tiles of 6 pixels, one every 4 pixels: 6 arrays of n tiles → 4 (n + 1) along `axis`."""
    zeros = jnp.zeros_like(lax.slice_in_dim(lines[0], 0, 1, axis=axis))
    own = [jnp.concatenate([line, zeros], axis) for line in lines[:TILE]]
    previous = [jnp.concatenate([zeros, line], axis) for line in lines[TILE:]]
    pixels = [a + b for a, b in zip(own, previous, strict=False)] + own[len(previous) :]
    y = jnp.stack(pixels, axis + 1)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _products(a, b, axis_a, precision):
    """The 36 matrix products of a and b, contracted over `axis_a` and the rows of b: 6 × (6, …)."""
    numbers = ((axis_a,), (1,)), ((0,), (0,))
    return [lax.dot_general(a[i], b[i], numbers, precision) for i in range(SPAN)]


def _tiles(size):
    """The number of tiles that cover `size` outputs."""
    return -(-size // TILE)


def _input_tiles(x, border):
    """Bᵀ d B of every tile d of the padded x: 6 × (6, batch · rows · columns, channels)."""
    pads = [(border, _tiles(n + 2 * border - 2) * TILE + 2 - n - border) for n in x.shape[1:3]]
    return _transform_tiles(x, B_T, pads)


def _transform_tiles(x, matrix, pads):
    """matrix @ tile @ matrixᵀ of every tile of x: 6 × (6, batch · rows · columns, channels).

    A tile starts every 4 pixels and is as wide as the matrix, so tiles of 6 overlap by 2. The
    barrier keeps XLA from recomputing the first product inside each part of the second.
    """
    x = _pad(x, pads)
    reach = [n - matrix.shape[1] + 1 for n in x.shape[1:3]]
    offsets = range(matrix.shape[1])
    xs = _combine(matrix, [x[:, i : i + reach[0] : TILE] for i in offsets])
    xs = [lax.optimization_barrier(x) for x in xs]  # 6 × (batch, rows, width, channels)
    xs = [_combine(matrix, [x[:, :, j : j + reach[1] : TILE] for j in offsets]) for x in xs]
    return [jnp.stack(row).reshape(SPAN, -1, x.shape[-1]) for row in xs]


def _transform_kernel(w, matrix):
    """matrix @ w @ matrixᵀ over the two leading axes of w, with the same barrier."""
    w = lax.optimization_barrier(jnp.stack(_combine(matrix, w)))
    return jnp.stack(_combine(matrix, jnp.moveaxis(w, 1, 0)), 1)


def _combine(matrix, xs):
    """matrix @ xs over the leading axis, as scalar products and sums, which XLA fuses."""
    return [
        reduce(jnp.add, (x if c == 1 else x * float(c) for c, x in zip(row, xs, strict=True) if c))
        for row in matrix
    ]


def _pad(x, pads):
    """Pads height and width with zeros. On a CPU, XLA concatenates faster than it pads."""
    for axis, widths in enumerate(pads, start=1):
        low, high = (jnp.zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype) for n in widths)
        x = jnp.concatenate([low, x, high], axis)
    return x


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
