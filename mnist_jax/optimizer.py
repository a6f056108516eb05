"""The optimizer of a Config: an optax chain with its learning-rate schedule, and the EMA."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mnist_jax.config import Config


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with Keras's default epsilon of 1e-7.

    Weight decay is decoupled from the gradient and applies to kernels alone (Loshchilov and Hutter,
    2019).

    Args:
        config: resolved.
        steps: updates in all epochs of the run, the length of a schedule.
    """
    parts = [optax.scale_by_adam(eps=1e-7)]
    if config.weight_decay:
        is_kernel = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=is_kernel))
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, steps)))
    if config.ema_decay:
        parts.append(params_ema(config.ema_decay))
    return optax.chain(*parts)


def learning_rate_schedule(config: Config, steps: int) -> optax.ScalarOrSchedule:
    """The learning rate as a function of the number of updates done, or a constant.

    onecycle: from `learning_rate` / 25 up to `learning_rate` in the first 30 % of the steps, then
    down to 1/10,000 of the start value, along cosines (Smith and Topin, 2018). cosine: half a
    cosine down to 0 (Loshchilov and Hutter, 2017).
    """
    assert config.learning_rate is not None, "the config is resolved"
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(steps, config.learning_rate)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    return config.learning_rate


class EmaState(NamedTuple):
    """State of `params_ema`."""

    num_updates: jax.Array  # int32 scalar, updates so far
    ema: Any  # a tree like the parameters, their weighted sum without bias correction


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters; put it last in a chain.

    It changes no update. `ema_params` reads the average.
    """

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, EmaState]:
        new = optax.apply_updates(params, updates)
        ema = optax.incremental_update(new, state.ema, 1 - decay)
        return updates, EmaState(state.num_updates + 1, ema)

    return optax.GradientTransformation(init, update)


def ema_params(params: Any, opt_state: Any, decay: float) -> Any:
    """The parameters to evaluate: their bias-corrected EMA if there is one, else `params`.

    The correction is that of Adam's moments: divide by 1 - decay^count.
    """
    if not decay:
        return params
    state = next(part for part in opt_state if isinstance(part, EmaState))
    count = jnp.maximum(jnp.max(state.num_updates), 1)  # the same for all members of an ensemble
    correction = -jnp.expm1(count * math.log(decay))  # 1 - decay^count, also for a decay near 1
    return jax.tree.map(lambda leaf: leaf / correction, state.ema)
