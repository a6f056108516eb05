"""Batches of a split, taken on the device."""

from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from mnist_jax.data.dataset import Split


class Batch(TypedDict):
    """Examples of one step. The last batch of an epoch is padded to the batch size and masked."""

    image: jax.Array  # (batch, height, width, channels) uint8; float32 from `steps.train_input` on
    label: jax.Array  # (batch,) int32; augmented also (batch, classes) float32
    mask: jax.Array  # (batch,) bool, False for padding


def num_batches(size: int, batch_size: int) -> int:
    """Batches in an epoch, including the last and smaller one."""
    return -(-size // batch_size)


def batch_index(
    size: int,
    order: jax.Array | None,
    i: jax.Array | int,
    *,
    batch_size: int,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The examples of batch `i` of `size` in this `order` (None: as stored), and their mask.

    With `sharding` each device gets the same number of rows, which takes more padding if the device
    count does not divide the batch size. Random draws depend on a row's place in the batch, not on
    its device.

    Returns indices, (rows,) int32, and the mask, (rows,) bool.
    """
    parts = 1 if sharding is None else sharding.num_devices
    rows = jnp.arange(-(-batch_size // parts) * parts, dtype=jnp.int32)
    place = i * batch_size + rows
    mask = (place < size) & (rows < batch_size)
    place = jnp.minimum(place, size - 1)
    return place if order is None else order[place], mask


def gather_batch(
    split: Split, index: jax.Array, mask: jax.Array, *, sharding: NamedSharding | None = None
) -> Batch:
    """The batch of the examples that `batch_index` found."""
    batch: Batch = {"image": split.image[index], "label": split.label[index], "mask": mask}
    if sharding is None or sharding.num_devices == 1:
        return batch
    return lax.with_sharding_constraint(batch, sharding)
