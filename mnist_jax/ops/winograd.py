"""Winograd's minimal filtering F(4×4, 3×3): a 3×3 convolution as 36 matrix products [1].

It computes a 4×4 tile of the output from a 6×6 input tile d, with 36 multiplications instead of
144:

    y = Aᵀ [ (G w Gᵀ) ⊙ (Bᵀ d B) ] A

Summed over input channels, each of the 36 elements of ⊙ is a matrix product: (tiles of the whole
batch × in) @ (in × out). The 36 are a list of 6 arrays (6, …), one per row, because a row fits the
cache and all 36 do not. A, B and G come from polynomial interpolation at 0, ±1, ±2 and ∞. The
formula is exact; float32 rounding errors are about ten times those of the definition. The gradients
are the transposed formula. With D = A g Aᵀ for each tile of the output's gradient g:

    dd = B [ (G w Gᵀ) ⊙ D ] Bᵀ, summed where tiles overlap
    dw = Gᵀ [ Σ over tiles (Bᵀ d B) ⊙ D ] G

All functions are for an XLA CPU: images (batch, height, width, channels) and kernels (3, 3, in,
out), float32 or wider, and `border` zeros on each side of an image.

[1] A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks, 2015,
    arXiv:1509.09308. Matrices for F(4×4, 3×3): section 4.3.
"""

from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 4  # outputs along one side of a tile
SPAN = TILE + 2  # inputs along one side

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


def convolution(x, w, border, precision):
    """The convolution of x with w: (batch, height + 2 border - 2, width + 2 border - 2, out)."""
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


def gradient_tiles(g):
    """D = A g Aᵀ of every tile of the output's gradient: 6 × (6, batch · rows · columns, out)."""
    return _transform_tiles(g, A_T.T, [(0, -n % TILE) for n in g.shape[1:3]])


def input_gradient(d, w, shape, border, precision):
    """The gradient of images of that shape, from `gradient_tiles`."""
    batch, height, width, _ = shape
    rows, columns = (_tiles(n + 2 * border - 2) for n in (height, width))
    u = jnp.swapaxes(_transform_kernel(w, G), 2, 3)  # (6, 6, out, in)
    m = _products(d, u, 2, precision)
    m = [row.reshape(SPAN, batch, rows, columns, -1) for row in m]
    dx = _overlap_add(_combine(B_T.T, m))  # (6, batch, 4 (rows + 1), columns, in)
    dx = lax.optimization_barrier(dx[:, :, border : border + height])
    return _overlap_add(_combine(B_T.T, dx))[:, :, border : border + width]


def kernel_gradient(d, x, border, precision):
    """The gradient of the kernel, (3, 3, in, out), from `gradient_tiles`."""
    dw = jnp.stack(_products(_input_tiles(x, border), d, 1, precision))
    return _transform_kernel(dw, G.T)


def _overlap_add(lines):
    """Sums tiles of 6 pixels, one every 4 pixels: 6 arrays of n tiles → 4 (n + 1) along axis 2."""
    zeros = jnp.zeros_like(lines[0][:, :, :1])
    own = [jnp.concatenate([line, zeros], 2) for line in lines[:TILE]]
    previous = [jnp.concatenate([zeros, line], 2) for line in lines[TILE:]]
    pixels = [a + b for a, b in zip(own, previous, strict=False)] + own[len(previous) :]
    y = jnp.stack(pixels, 3)
    return y.reshape(*y.shape[:2], -1, *y.shape[4:])


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
    x = pad(x, pads)
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


def pad(x, pads):
    """Pads height and width with zeros. On a CPU, XLA concatenates faster than it pads."""
    for axis, widths in enumerate(pads, start=1):
        low, high = (jnp.zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype) for n in widths)
        x = jnp.concatenate([low, x, high], axis)
    return x
