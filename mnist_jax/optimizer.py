"""A config's recipe as the things it is made of: the optimizer, and what a step does besides."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mnist_jax.config import Config
from mnist_jax.data.augment import Augmentation
from mnist_jax.steps import StepConfig


def step_config(config: Config) -> StepConfig:
    """What a step does besides the model and the optimizer."""
    augmentation = Augmentation(config.shift, config.rotation, config.scale)
    return StepConfig(config.normalize, augmentation, config.label_smoothing, config.microbatches)


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with the epsilon that Keras takes by default.

    With weight decay, kernels alone are decayed, apart from the gradient (Loshchilov and Hutter,
    2019).

    Args:
        config: the recipe.
        steps: updates in all epochs of the run, over which a schedule stretches.
    """
    parts = [optax.scale_by_adam(eps=1e-7)]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_kernels))
    parts.append(optax.scale_by_learning_rate(_schedule(config, steps)))
    if config.ema_decay:
        parts.append(params_ema(config.ema_decay))
    return optax.chain(*parts)


def _schedule(config: Config, steps: int) -> optax.ScalarOrSchedule:
    """The learning rate, by the number of updates done.

    onecycle: from a 25th up to `learning_rate` in the first 30 % of the steps, and down to a
    10,000th of where it began, along cosines (Smith and Topin, 2018). cosine: down to 0 along half
    a cosine (Loshchilov and Hutter, 2017).
    """
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(steps, config.learning_rate)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, steps)
    return config.learning_rate


def _kernels(params: Any) -> Any:
    """True for each parameter with more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class EmaState(NamedTuple):
    """State of `params_ema`: updates seen, and their weighted sum of parameters."""

    updates: jax.Array
    average: Any


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the parameters; changes no update. The last of a chain.

    Corrected for its start at zero, as Adam's moments are; `averaged` reads it.
    """

    def init(params: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, EmaState]:
        new = optax.apply_updates(params, updates)
        average = optax.incremental_update(new, state.average, 1 - decay)
        return updates, EmaState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def ema_params(params: Any, opt_state: Any, decay: float) -> Any:
    """The parameters that are evaluated: their average where one is kept, else themselves."""
    if not decay:
        return params
    state = next(part for part in opt_state if isinstance(part, EmaState))
    count = jnp.maximum(jnp.max(state.updates), 1)  # the same for all members of an ensemble
    correction = -jnp.expm1(count * math.log(decay))  # 1 - decayⁿ, also for a decay close to 1
    return jax.tree.map(lambda leaf: leaf / correction, state.average)
