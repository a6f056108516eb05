"""2×2 max pooling, with a gradient that reads the places of the maxima and not the input."""

import jax
import jax.numpy as jnp


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """The maximum of each 2×2 window: (batch, height, width, c) → (batch, ⌊h/2⌋, ⌊w/2⌋, c).

    If several pixels of a window share the maximum, the first in reading order gets the gradient,
    as in TensorFlow and PyTorch. Unlike a window reduction, this may ignore a NaN beside a number.
    It has a gradient in reverse mode only.
    """
    return _max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


@jax.custom_vjp
def _max_pool(x):
    return _pool(x)[0]


def _pool(x):
    """The maxima, and which pixel of its window each one is: 0 to 3, uint8."""
    a, b, c, d = (x[:, i::2, j::2] for i in range(2) for j in range(2))
    top, bottom = jnp.where(a >= b, a, b), jnp.where(c >= d, c, d)
    places = jnp.where(top >= bottom, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.where(top >= bottom, top, bottom), places.astype(jnp.uint8)


def _unpool(places, g):
    # Each pixel of the window gets g or 0. A GPU is much slower if it compares the inputs again.
    windows = jnp.arange(4, dtype=jnp.uint8).reshape(2, 1, 2, 1)
    g, places = (a[:, :, None, :, None] for a in (g, places))
    dx = jnp.where(places == windows, g, 0)  # (batch, height / 2, 2, width / 2, 2, c)
    batch, height, _, width, _, channels = dx.shape
    return (dx.reshape(batch, 2 * height, 2 * width, channels),)


_max_pool.defvjp(_pool, _unpool)
