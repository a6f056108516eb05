"""`steps.train_steps` for a GPU: the same steps, in fewer kernels.

With `compiler.compiler_options` a step is one CUDA graph. In it a kernel still takes its time to
start, and most kernels of a step compute little. So this loop

- draws what needs no parameters (keys, indices, masks) for all steps before the first;
- keeps the layers' weights in the precision that the model casts them to, because the cast costs
  nothing within the update;
- joins all small arrays (biases, their moments, counters) into one, which one kernel updates;
- looks for numbers that are not finite in all gradients at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding

from mnist_jax.data.batches import batch_index, gather_batch
from mnist_jax.data.dataset import Split
from mnist_jax.metrics import Metrics
from mnist_jax.models import trace_training
from mnist_jax.steps import StepConfig, StepKeys, TrainState, step_keys, train_step

SMALL = 4096  # numbers, at most, in an array that is joined with others
ROW = 4096  # numbers that are reduced to one; XLA, compiled for an H100, does that in one kernel


def train_steps(
    state: TrainState,
    metrics: Metrics,
    split: Split,
    order: jax.Array,
    root_key: jax.Array,
    first: jax.Array | int,
    steps: int,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    batch_size: int,
    step_config: StepConfig,
    sharding: NamedSharding | None = None,
    log_size: int = 0,
) -> tuple[TrainState, Metrics, dict[str, jax.Array]]:
    """As `steps.train_steps`, but `steps` is a Python int.

    With a `log_size` other than 0 the log has an entry for each step.
    """
    size, start = split.label.shape[0], state.step

    @jax.vmap
    def draw(i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], StepKeys]:
        rows = batch_index(size, order, first + i, batch_size=batch_size, sharding=sharding)
        return rows, step_keys(root_key, start + i)

    dtypes = cast_dtypes(model, state.params, state.model_state)

    def body(carry: Any, inputs: Any) -> Any:
        state, metrics, weights = unravel(carry)
        rows, keys = inputs
        state, step_metrics, values = train_step(
            state,
            gather_batch(split, *rows, sharding=sharding),
            keys,
            jax.tree.map(lambda x, y: x if y is None else y, state.params, weights),
            model=model,
            tx=tx,
            step_config=step_config,
            finite=finite_rows,
        )
        after = state, metrics.merge(step_metrics), cast_params(state.params, dtypes)
        return ravel_small(after)[0], values if log_size else {}

    rows = jax.eval_shape(finite_rows, (metrics.loss_sum, state.params)).shape
    nonfinite = jnp.broadcast_to(metrics.first_nonfinite, rows)
    metrics = dataclasses.replace(metrics, first_nonfinite=nonfinite)
    carry, unravel = ravel_small((state, metrics, cast_params(state.params, dtypes)))
    carry, log = lax.scan(body, carry, draw(jnp.arange(steps)))
    state, metrics, _ = unravel(carry)
    nonfinite = jnp.min(metrics.first_nonfinite)
    return state, dataclasses.replace(metrics, first_nonfinite=nonfinite), log


def ravel_small(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Joins the small vectors and the scalars among the leaves, float32 and int32, bit for bit.

    Returns what a loop carries in place of the tree, and a function that makes the tree from it.
    """

    def is_small(x: jax.Array) -> bool:
        return x.ndim <= 1 and x.size <= SMALL and x.dtype in (jnp.float32, jnp.int32)

    def small_bits(x: jax.Array) -> jax.Array | None:
        return lax.bitcast_convert_type(x, jnp.int32) if is_small(x) else None

    def join(x: jax.Array, bits: jax.Array | None, other: jax.Array) -> jax.Array:
        return other if bits is None else lax.bitcast_convert_type(bits, x.dtype)

    vector, unravel_vector = ravel_pytree(jax.tree.map(small_bits, tree))
    # In place of what is joined stands an empty array, whose type `scan` checks.
    others = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype) if is_small(x) else x, tree)
    return (vector, others), lambda now: jax.tree.map(join, tree, unravel_vector(now[0]), now[1])


def finite_rows(tree: Any) -> jax.Array:
    """Whether all numbers of the leaves are finite, in parts: (rows,) bool.

    One kernel reads all leaves. Joining the parts takes another, and can wait for the last step.
    """
    # XLA keeps the kernels of convolutions with their outputs first. In another order the update,
    # which computes these values too, transposes them: 83 µs of a step of 536 on an H200.
    leaves = [jnp.moveaxis(x, -1, 0) if x.ndim > 2 else x for x in jax.tree.leaves(tree)]
    finite = jnp.concatenate([jnp.isfinite(leaf).ravel() for leaf in leaves])
    padded = jnp.pad(finite, (0, -finite.size % ROW), constant_values=True)
    return jnp.all(padded.reshape(-1, ROW), axis=1)


def cast_dtypes(model: nn.Module, params: Any, model_state: Any) -> Any:
    """A tree like the parameters: the dtype to which the model casts each; None without a cast.

    The model uses such a leaf only in this cast. So it computes the same from the leaf in that
    dtype, and the same gradient. Vectors are excluded: other kernels cast them on the way.
    """
    jaxpr = trace_training(model, params, model_state)[0].jaxpr
    structure, dtypes = jax.tree.structure(params), []
    for variable in jaxpr.invars[: structure.num_leaves]:
        uses = [equation for equation in jaxpr.eqns if variable in equation.invars]
        is_cast = len(uses) == 1 and uses[0].primitive.name == "convert_element_type"
        is_cast &= variable not in jaxpr.outvars and len(variable.aval.shape) > 1
        dtype = uses[0].params["new_dtype"] if is_cast else jnp.int32
        dtypes.append(dtype if jnp.issubdtype(dtype, jnp.floating) else None)
    return jax.tree.unflatten(structure, dtypes)


def cast_params(params: Any, dtypes: Any) -> Any:
    """The parameters in the dtypes from `cast_dtypes`; None in place of those without one."""
    return jax.tree.map(lambda x, dtype: None if dtype is None else x.astype(dtype), params, dtypes)
