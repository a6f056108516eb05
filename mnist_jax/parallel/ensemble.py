"""Many networks in one program: the members of an ensemble, one for each seed.

What belongs to a member (state, metrics, order, key) is stacked along a leading axis; the data is
shared. A member computes what a run with its seed alone would.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec


def member_of(tree: Any, member: int) -> Any:
    """One member's part of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def over_members(
    function: Callable[..., Any], is_stacked: Sequence[bool], *, sequential: bool
) -> Callable[..., Any]:
    """`function` for all members; its results are stacked.

    Args:
        function: of positional arguments, for one member.
        is_stacked: for each argument, whether it is stacked by member or shared.
        sequential: `lax.map` over the members instead of `vmap`: slower if the operations are too
            small to fill the device, but with the activations of only one member in memory.
    """
    if not sequential:
        return jax.vmap(function, [0 if stacked else None for stacked in is_stacked])

    def loop(*args: Any) -> Any:
        stacked = {i: arg for i, arg in enumerate(args) if is_stacked[i]}
        return lax.map(lambda own: function(*_replace(args, own)), stacked)

    return loop


def over_devices(
    function: Callable[..., Any], is_stacked: Sequence[bool], mesh: Mesh
) -> Callable[..., Any]:
    """`function` from `over_members`, with an equal share of the members on each device.

    The devices do not communicate. Python ints among the arguments are static.
    """
    members, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()

    def call(*args: Any) -> Any:
        arrays = {i: arg for i, arg in enumerate(args) if not isinstance(arg, int)}
        specs = {i: members if is_stacked[i] else shared for i in arrays}

        @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=members, check_vma=False)
        def on_device(local: dict[int, Any]) -> Any:
            return function(*_replace(args, local))

        return on_device(arrays)

    return call


def _replace(args: Sequence[Any], new: dict[int, Any]) -> list[Any]:
    """The arguments, with new ones at some positions."""
    return [new.get(i, arg) for i, arg in enumerate(args)]
