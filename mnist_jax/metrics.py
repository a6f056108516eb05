"""Metrics as sums: merged freely, divided once, so that no average is an average of averages."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
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
    def zeros(cls, members: int | None = None) -> "Metrics":
        """No examples yet; scalars, or arrays for so many members of an ensemble."""
        # NumPy's: the device is not asked, and nothing is compiled.
        zeros: Any = np.float32(0), np.int32(0), np.int32(0), np.int32(NEVER)
        if members is not None:
            zeros = (np.full(members, zero) for zero in zeros)
        return cls(*zeros)

    def merge(self, other: "Metrics") -> "Metrics":
        """The sums over both sets of examples."""
        return Metrics(
            self.loss_sum + other.loss_sum,
            self.correct + other.correct,
            self.count + other.count,
            jnp.minimum(self.first_nonfinite, other.first_nonfinite),
        )

    @property
    def loss(self) -> Any:
        """Mean loss in nats: a float, or a list of one for each member. Reads the device."""
        return self._mean(self.loss_sum)

    @property
    def accuracy(self) -> Any:
        """Fraction correct, 0..1: a float, or a list of one for each member. Reads the device."""
        return self._mean(self.correct)

    def _mean(self, total: jax.Array) -> Any:
        # In float64: a count of 60,000 images loses nothing, nor does a float32.
        return (np.asarray(total, np.float64) / np.maximum(self.count, 1)).tolist()


def kept_members(row: Mapping[str, Any]) -> list[bool]:
    """Of a line of metrics.jsonl, which members are not lost: none of their losses is None."""
    losses = [np.ravel(value).tolist() for name, value in row.items() if name.endswith("/loss")]
    return [None not in of_member for of_member in zip(*losses, strict=True)]


def of_kept_members(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of a line of metrics.jsonl, each as a list over the members that are not lost.

    The list is of one number where there are no members, and empty where all are lost.
    """
    values = {name: np.ravel(value).tolist() for name, value in row.items()}
    kept = kept_members(row)
    return {
        name: [value for value, keep in zip(each, kept, strict=True) if keep]
        if "/" in name
        else each
        for name, each in values.items()
    }


def mean_over_members(row: Mapping[str, Any], name: str) -> float:
    """The mean over the members that are not lost; NaN where all are."""
    values = of_kept_members(row)[name]
    return sum(values) / len(values) if values else math.nan
