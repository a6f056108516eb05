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
    function: Callable[..., Any], is_stacked: Sequence[bool], mesh: Mesh, *, sequential: bool
) -> Callable[..., Any]:
    """`function` for all members, an equal share of them on each device; its results are stacked.

    The devices do not communicate.

    Args:
        function: of positional arguments, for one member. Python ints among them are static.
        is_stacked: for each argument, whether it is stacked by member or shared.
        mesh: from `mesh.make_mesh`.
        sequential: `lax.map` over the members instead of `vmap`: slower if the operations are too
            small to fill the device, but with the activations of only one member in memory.
    """
    members, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()

    def call(*args: Any) -> Any:
        arrays = {i: arg for i, arg in enumerate(args) if not isinstance(arg, int)}
        specs = {i: members if is_stacked[i] else shared for i in arrays}

        @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=members, check_vma=False)
        def on_device(local: dict[int, Any]) -> Any:
            def one(own: dict[int, Any]) -> Any:
                values = dict(enumerate(args)) | local | own
                return function(*values.values())

            stacked = {i: array for i, array in local.items() if is_stacked[i]}
            return lax.map(one, stacked) if sequential else jax.vmap(one)(stacked)

        return on_device(arrays)

    return call
