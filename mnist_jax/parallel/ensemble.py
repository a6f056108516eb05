"""Several trainings in one program: the members of an ensemble, each with a seed of its own.

What belongs to a member (state, sums, order, key) is stacked along a first axis; the data is
shared. A member computes what a run of its own would.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec


def member_of(tree: Any, member: int) -> Any:
    """One member's part of what is stacked."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def over_members(
    function: Callable[..., Any], per_member: Sequence[bool], *, one_by_one: bool
) -> Callable[..., Any]:
    """`function` for all members at once.

    Args:
        function: of positional arguments, computing for one member.
        per_member: for each argument, whether it is stacked by member or shared by all.
        one_by_one: one after the other in a loop on the device, and not all in each operation:
            slower where operations are too small for the device, and needs no more memory for
            activations than one member.

    Returns:
        The same, whose stacked arguments and results have the members along their first axis.
    """
    if not one_by_one:
        axes = tuple(0 if own else None for own in per_member)
        return lambda *args: jax.vmap(function, axes[: len(args)])(*args)

    def loop(*args: Any) -> Any:
        mine = [arg for arg, own in zip(args, per_member, strict=False) if own]

        def one(own_args: list[Any]) -> Any:
            own = iter(own_args)
            pairs = zip(args, per_member, strict=False)
            return function(*(next(own) if is_own else arg for arg, is_own in pairs))

        return lax.map(one, mine)

    return loop


def over_devices(
    function: Callable[..., Any], per_member: Sequence[bool], mesh: Mesh
) -> Callable[..., Any]:
    """`function`, made by `over_members`, with an equal part of the members on each device.

    What it computes there has nothing to do with the other devices: nothing passes between them.

    Args:
        function: of positional arguments; those that are Python ints are static.
        per_member: as in `over_members`.
        mesh: of one axis, along which the members lie.
    """
    members, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()

    def call(*args: Any) -> Any:
        arrays = {i: arg for i, arg in enumerate(args) if not isinstance(arg, int)}

        def on_each(here: dict[int, Any]) -> Any:
            return function(*(here.get(i, arg) for i, arg in enumerate(args)))

        specs = {i: members if per_member[i] else shared for i in arrays}
        spread = jax.shard_map(
            on_each, mesh=mesh, in_specs=(specs,), out_specs=members, check_vma=False
        )
        return spread(arrays)

    return call
