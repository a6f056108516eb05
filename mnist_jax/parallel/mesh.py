"""Devices: which ones run, and how arrays are sharded over their mesh."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnist_jax.errors import DeviceError, UsageError, first_line


def select_device(platform: str) -> jax.Device:
    """This process's first device of a platform; for 'auto', of the best that JAX finds.

    Raises DeviceError if the platform is absent: no other one is taken in its place.
    """
    try:
        return jax.local_devices(backend=None if platform == "auto" else platform)[0]
    except (RuntimeError, AssertionError) as error:  # an assertion if no backend starts at all
        raise DeviceError(
            f"no device for --platform={platform} ({first_line(error) or 'JAX finds none'}); "
            "install JAX for it (the extras cuda12, cuda13, tpu), or change --platform or "
            "JAX_PLATFORMS"
        ) from error


def select_devices(first: jax.Device, count: int | Literal["all"] | None) -> list[jax.Device]:
    """`count` devices of the platform of `first`; None: one, or all if there are several processes.

    Raises DeviceError if there are fewer, or if several processes would not use all of theirs.
    """
    found, processes = jax.devices(first.platform), jax.process_count()
    if count is None:
        return found if processes > 1 else [first]
    if count in ("all", len(found)):
        return found
    if processes > 1 or count > len(found):
        raise DeviceError(
            f"devices is {count}; JAX finds {len(found)} ({first.platform}); change --devices "
            "(with several processes leave it out), or set JAX_NUM_CPU_DEVICES for a CPU"
        )
    return found[:count]


def make_mesh(devices: Sequence[jax.Device], members: int | None = None) -> Mesh:
    """A mesh of one axis: "batch", or "members" if there are several networks to train.

    Raises UsageError if the devices do not divide the members.
    """
    count = len(devices)
    if members is not None and members % count:
        nearest = [n for n in (members // count * count, -(-members // count) * count) if n]
        raise UsageError(
            f"{count} devices do not divide {members} networks; train "
            f"{' or '.join(map(str, nearest))}, or change --devices"
        )
    # Auto: XLA propagates shardings from that of the batch. Not `jax.make_mesh`, which on a TPU
    # accepts only device counts that fill its topology.
    axis = "batch" if members is None else "members"
    return Mesh(np.asarray(devices), (axis,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of an array."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """The first axis of an array (examples of a batch, or members) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*mesh.axis_names))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays, which every process has, as arrays on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # `device_put` would compare the arrays of all processes first.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )


def to_host(tree: Any) -> Any:
    """As NumPy arrays in every process, which all must call this if there are several."""

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))
