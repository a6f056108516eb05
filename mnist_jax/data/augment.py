"""Small random distortions of the training images, inside the compiled step."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far an image may be moved; each amount is drawn uniformly, for each image by itself.

    Attributes:
        shift: pixels along each axis, up to this many either way.
        rotation: degrees, up to this many either way.
        scale: the size of each axis changes by a factor from 1 / (1 + scale) to 1 + scale.
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.shift or self.rotation or self.scale)

    def __call__(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """Images (batch, height, width, 1) float, moved; what comes in from outside is 0.

        Each output pixel is looked up where the inverse map puts it, between four input pixels
        (bilinear). The draws depend on the key and on an image's place in the batch alone.
        """
        batch, height, width = images.shape[:3]
        draw = jax.random.uniform(key, (batch, 5), minval=-1.0, maxval=1.0)
        angle = draw[:, 0] * (self.rotation * jnp.pi / 180)
        stretch_y, stretch_x = jnp.exp(-draw[:, 1:3].T * jnp.log1p(self.scale))
        shift_y, shift_x = draw[:, 3:5].T * self.shift
        y = jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2
        x = jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2

        def spread(values: jax.Array) -> jax.Array:
            return values[:, None, None]  # one for each image

        y = y[None, :, None] - spread(shift_y)  # (batch, height, 1)
        x = x[None, None, :] - spread(shift_x)  # (batch, 1, width)
        sine, cosine = spread(jnp.sin(angle)), spread(jnp.cos(angle))
        from_y = (cosine * y + sine * x) * spread(stretch_y) + (height - 1) / 2
        from_x = (cosine * x - sine * y) * spread(stretch_x) + (width - 1) / 2
        return _bilinear(images[..., 0], from_y, from_x)[..., None]


def _bilinear(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The values of each image (batch, height, width) at its points (y, x), of the same shape."""
    batch, height, width = images.shape
    images = jnp.pad(images, ((0, 0), (1, 2), (1, 2)))  # so that all four neighbours exist
    y, x = jnp.clip(y + 1, 0, height + 1), jnp.clip(x + 1, 0, width + 1)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = y - top, x - left
    row = width + 3
    corner = top.astype(jnp.int32) * row + left.astype(jnp.int32)
    # Image by image, so that images that lie on several devices stay where they are.
    flat, corner = images.reshape(batch, -1), corner.reshape(batch, -1)

    def at(offset: int) -> jax.Array:
        found = jnp.take_along_axis(flat, corner + offset, axis=1, mode="promise_in_bounds")
        return found.reshape(batch, height, width)

    above = at(0) * (1 - right) + at(1) * right
    below = at(row) * (1 - right) + at(row + 1) * right
    return above * (1 - down) + below * down
