"""Metrics as sums: merged freely, divided once, so that no average is an average of averages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MetricSums:
    """Sums over the examples seen. All are scalars (or stacked alike, under `vmap`).

    Attributes:
        loss_sum: float32, cross-entropy in nats, summed.
        correct: int32, examples whose largest logit is the label's.
        count: int32, examples.
        first_nonfinite: int32, the first step whose loss or gradient was NaN or infinite, or
            `NEVER`.
    """

    loss_sum: jax.Array
    correct: jax.Array
    count: jax.Array
    first_nonfinite: jax.Array

    @classmethod
    def zeros(cls) -> "MetricSums":
        """No examples yet."""
        # NumPy's scalars: the device is not asked, and nothing is compiled.
        zeros: Any = np.float32(0), np.int32(0), np.int32(0), np.int32(NEVER)
        return cls(*zeros)

    def merge(self, other: "MetricSums") -> "MetricSums":
        """The sums over both sets of examples."""
        return MetricSums(
            self.loss_sum + other.loss_sum,
            self.correct + other.correct,
            self.count + other.count,
            jnp.minimum(self.first_nonfinite, other.first_nonfinite),
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats. Reads the device."""
        return float(self.loss_sum) / max(int(self.count), 1)

    @property
    def accuracy(self) -> float:
        """Fraction correct, 0..1. Reads the device."""
        return int(self.correct) / max(int(self.count), 1)
