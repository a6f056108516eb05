"""The losses that training can minimise, by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax


def cross_entropy(logits: jax.Array, batch: Any, *, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy in nats, (batch,) float32.

    Args:
        logits: (batch, classes) float32.
        batch: its label is (batch,) int32, or (batch, classes) float32, a distribution each.
        label_smoothing: fraction of a label that is spread evenly over all classes (Szegedy et al.,
            2016, section 7).
    """
    label = batch["label"]
    if label.ndim == logits.ndim:
        losses = optax.softmax_cross_entropy(logits, label)
    else:
        # On an accelerator the gradient of optax's gather is a scatter; a sum's needs none.
        losses = lax.platform_dependent(
            logits,
            label,
            cpu=optax.softmax_cross_entropy_with_integer_labels,
            default=_cross_entropy_with_integer_labels,
        )
    if label_smoothing:
        uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses


def _cross_entropy_with_integer_labels(logits: jax.Array, label: jax.Array) -> jax.Array:
    is_label = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - label_logit


LOSSES: dict[str, Callable[..., jax.Array]] = {"cross_entropy": cross_entropy}
"""The losses by name: functions of logits (batch, classes) float32 and a batch, to one value for
each example, (batch,). The batch holds the label, the mask and the image as the network sees it.
`--label_smoothing` and `--options` set keyword arguments."""
