"""Random distortions and augmentations of training batches, inside the compiled step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Distortion:
    """A random affine map for each image: uniform shifts and angles, log-uniform scales."""

    shift: float = 0.0  # pixels along each axis, at most, in either direction
    rotation: float = 0.0  # degrees, at most, in either direction
    scale: float = 0.0  # each axis is scaled by a factor from 1 / (1 + scale) to 1 + scale

    def __bool__(self) -> bool:
        return bool(self.shift or self.rotation or self.scale)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Distorts images, (batch, height, width, channels) float; pixels from outside are 0.

        The inverse map gives the position of each output pixel in the input, which is
        interpolated bilinearly. The draws depend on the key and an image's index in the batch.
        """
        batch, height, width = images.shape[:3]
        draw = jax.random.uniform(key, (batch, 5), minval=-1.0, maxval=1.0)
        angle = draw[:, 0] * (self.rotation * jnp.pi / 180)
        stretch_y, stretch_x = jnp.exp(-draw[:, 1:3].T * jnp.log1p(self.scale))
        shift_y, shift_x = draw[:, 3:5].T * self.shift
        y = jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2
        x = jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2

        y = y[None, :, None] - shift_y[:, None, None]  # (batch, height, 1)
        x = x[None, None, :] - shift_x[:, None, None]  # (batch, 1, width)
        sine, cosine = jnp.sin(angle)[:, None, None], jnp.cos(angle)[:, None, None]
        from_y = (cosine * y + sine * x) * stretch_y[:, None, None] + (height - 1) / 2
        from_x = (cosine * x - sine * y) * stretch_x[:, None, None] + (width - 1) / 2
        channels = jnp.moveaxis(images, -1, 0)
        return jnp.stack([_bilinear(channel, from_y, from_x) for channel in channels], axis=-1)


AUGMENTATIONS: dict[str, Callable[..., Any]] = {}
"""Augmentations of a training batch by name, after its distortion: functions of a batch and a
key, to a batch. Image (float32) and mask keep shape and dtype; the label may become a distribution,
(batch, classes) float32. `--options` set keyword arguments."""


def _bilinear(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Samples images at the points (y, x); all arrays are (batch, height, width)."""
    batch, height, width = images.shape
    images = jnp.pad(images, ((0, 0), (1, 2), (1, 2)))  # all four neighbours exist
    y, x = jnp.clip(y + 1, 0, height + 1), jnp.clip(x + 1, 0, width + 1)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = y - top, x - left
    row = width + 3
    corner = top.astype(jnp.int32) * row + left.astype(jnp.int32)
    # Indexed per image, so that a batch sharded over devices stays where it is.
    flat, corner = images.reshape(batch, -1), corner.reshape(batch, -1)

    def at(offset: int) -> jax.Array:
        found = jnp.take_along_axis(flat, corner + offset, axis=1, mode="promise_in_bounds")
        return found.reshape(batch, height, width)

    above = at(0) * (1 - right) + at(1) * right
    below = at(row) * (1 - right) + at(row + 1) * right
    return above * (1 - down) + below * down
