"""Many networks in one program: the members of an ensemble, one for each seed.

What belongs to a member (state, metrics, order, key) is stacked along a leading axis; the data is
shared. A member computes what a run with its seed alone would.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def member_of(tree: Any, member: int) -> Any:
    """One member's part of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[member, ...], tree)  # of a scalar an array, too


def over_members(
    function: Callable[..., Any], is_stacked: Sequence[bool], mesh: Mesh, *, sequential: bool
) -> Callable[..., Any]:
    """`function` for all members, an equal share of them on each device; its results are stacked.

    The devices do not communicate.

    Each positional argument is stacked by member, or shared; Python ints come last and are static.
    `sequential` is a loop over the members instead of `vmap`: slower if the operations are too
    small to fill the device, but with the activations of only one member in memory.
    """
    members, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()

    def call(*args: Any) -> Any:
        arrays = [arg for arg in args if not isinstance(arg, int)]
        static, stacked = args[len(arrays) :], is_stacked[: len(arrays)]
        assert all(isinstance(arg, int) for arg in static), "Python ints come last"

        def one(*arrays: Any) -> Any:
            return function(*arrays, *static)

        each = jax.custom_batching.sequential_vmap(one) if sequential else one
        some = jax.vmap(each, in_axes=[0 if own else None for own in stacked])
        specs = tuple(members if own else shared for own in stacked)
        every = jax.shard_map(some, mesh=mesh, in_specs=specs, out_specs=members, check_vma=False)
        return every(*arrays)

    return call
