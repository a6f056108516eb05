"""Sums over the parts of a batch in one fixed order, whatever the number of devices.

A sum of floating-point numbers depends on its order, and the order inside a product of matrices on
the matrices' shapes: that is why a batch spread over two devices has not quite the gradient that
one device finds. Here the parts have one shape, are computed by one code, and are summed as a
binary tree, ((0 + 1) + (2 + 3)) + …, whose lower levels lie on one device and whose upper levels go
from device to device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec


def tree_sum(
    of_part: Callable[[Any, Any, jax.Array], Any], shared: Any, parts: Any, mesh: Mesh | None
) -> Any:
    """The sum of `of_part` over all parts.

    Args:
        of_part: (shared, part, its number, an int32 scalar) → a tree of arrays.
        shared: what all parts need.
        parts: a tree of arrays with the parts along their first axis; a power of two of them.
        mesh: of one axis, over which the parts are spread evenly, a power of two of devices; None
            for one device.

    Returns:
        A tree as of one part; with a mesh, the same on every device.
    """
    if mesh is None:
        return _sum_here(of_part, shared, parts, jnp.int32(0))
    (axis,) = mesh.axis_names

    def on_each(shared: Any, parts: Any) -> Any:
        first = lax.axis_index(axis) * len(jax.tree.leaves(parts)[0])
        found, reach = _sum_here(of_part, shared, parts, first), 1
        while reach < mesh.size:
            # Both of a pair add the same two numbers, so that they go on with the same sum.
            pairs = [(device, device ^ reach) for device in range(mesh.size)]
            others = jax.tree.map(partial(lax.ppermute, axis_name=axis, perm=pairs), found)
            found, reach = _add(found, others), 2 * reach
        return found

    whole, spread = PartitionSpec(), PartitionSpec(axis)
    return jax.shard_map(
        on_each, mesh=mesh, in_specs=(whole, spread), out_specs=whole, check_vma=False
    )(shared, parts)


def _sum_here(of_part, shared, parts, first):
    """`tree_sum` on one device, of the parts from number `first` on."""
    count = len(jax.tree.leaves(parts)[0])

    def keep(i, found):
        one = of_part(shared, jax.tree.map(lambda x: x[i], parts), first + i)
        return jax.tree.map(lambda each, x: each.at[i].set(x), found, one)

    shapes = jax.eval_shape(of_part, shared, jax.tree.map(lambda x: x[0], parts), first)
    found = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    found = lax.fori_loop(0, _hidden(count), keep, found)
    while count > 2:
        halves = (jax.tree.map(lambda x, i=i: x[i::2], found) for i in (0, 1))
        found, count = _add(*halves), count // 2
    last = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(count)]
    return last[0] if count == 1 else _add(*last)


def _add(a, b):
    """a + b, not to be fused with what comes after: that is to be one code wherever a sum ends."""
    add = partial(jax.tree.map, jnp.add)
    return lax.fori_loop(0, _hidden(1), lambda _, total: add(total, b), a)


def _hidden(count):
    """A number that the compiler does not know: of a loop of one it would make other code."""
    return lax.optimization_barrier(jnp.int32(count))
