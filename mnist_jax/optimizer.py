"""The optimizers by name, learning-rate schedules, and the EMA of the parameters."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


def adam(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with Keras's default epsilon of 1e-7.

    Weight decay is decoupled from the gradient and applies to kernels alone, as in AdamW
    (Loshchilov and Hutter, 2019).
    """
    parts = [optax.scale_by_adam(eps=1e-7), optax.scale_by_learning_rate(learning_rate)]
    if isinstance(weight_decay, jax.Array) or weight_decay:
        is_kernel = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        parts.insert(1, optax.add_decayed_weights(weight_decay, mask=is_kernel))
    return optax.chain(*parts)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
}
"""The optimizers by name: functions of a learning rate, or a schedule, and keyword arguments, as in
optax. The flags weight_decay and momentum, and --options, set these keyword arguments."""


def make_optimizer(
    name: str, learning_rate: float, *, schedule: str, steps: int, **options: Any
) -> optax.GradientTransformation:
    """An optimizer whose learning rate and weight decay are part of its state.

    So one compiled program serves every learning rate, and `vmap` trains with several.

    Args:
        name: in `OPTIMIZERS`.
        learning_rate: with a schedule, its highest value.
        schedule: constant; cosine: half a cosine down to 0 (Loshchilov and Hutter, 2017); onecycle:
            from `learning_rate` / 25 up to `learning_rate` in the first 30 % of the steps, then
            down to 1/10,000 of the start value, along cosines (Smith and Topin, 2018).
        steps: updates in all epochs of the run, the length of the schedule.
        options: keyword arguments of the optimizer.
    """
    optimizer = OPTIMIZERS[name]  # now: another fork may replace it before a step is traced

    def make(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        rate = learning_rate
        if schedule == "cosine":
            rate = optax.cosine_decay_schedule(learning_rate, steps)
        elif schedule == "onecycle":
            rate = optax.cosine_onecycle_schedule(steps, learning_rate)
        in_state = {} if weight_decay is None else {"weight_decay": weight_decay}
        return optimizer(rate, **{**options, **in_state})

    decay = options.get("weight_decay")
    if not isinstance(decay, jax.Array) and not decay:
        decay = None  # a 0 stays a constant, so that the program does not add it
    return optax.inject_hyperparams(make)(learning_rate=learning_rate, weight_decay=decay)


@partial(jax.jit, static_argnames="decay")
def ema_params(ema: Any, step: Any, decay: float) -> Any:
    """The bias-corrected EMA after `step` updates. It is compiled: all callers get the same bits.

    The correction is that of Adam's moments: divide by 1 - decay^step.
    """
    count = jnp.maximum(jnp.max(step), 1).astype(jnp.float32)  # the same for all members
    correction = -jnp.expm1(count * math.log(decay))  # 1 - decay^count, also for a decay near 1
    return jax.tree.map(lambda leaf: leaf / correction, ema)
