"""Metrics as sums over examples, divided once at the end; the confusion matrix."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Sums over examples. Scalars, or (members,) arrays for an ensemble."""

    loss_sum: jax.Array  # float32, summed loss; in evaluation cross-entropy in nats
    correct: jax.Array  # int32, examples whose largest logit is at the label
    count: jax.Array  # int32, examples
    first_nonfinite: jax.Array  # int32, first step with a non-finite loss or gradient, or `NEVER`

    @classmethod
    def zeros(cls, members: int | None = None) -> "Metrics":
        """The sums over no examples, as NumPy arrays () or (members,)."""
        shape = () if members is None else (members,)
        zeros = np.float32(0), np.int32(0), np.int32(0), np.int32(NEVER)
        arrays: Any = (np.full(shape, zero) for zero in zeros)
        return cls(*arrays)

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
        """Mean loss: a float, or a list with one per member. Waits for the device."""
        return self._mean(self.loss_sum)

    @property
    def accuracy(self) -> Any:
        """Fraction correct, 0..1: a float, or a list with one per member. Waits for the device."""
        return self._mean(self.correct)

    def _mean(self, total: jax.Array) -> Any:
        return (np.asarray(total, np.float64) / np.maximum(self.count, 1)).tolist()


def confusion_matrix(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrix, (classes, classes) int: a row per label, a column per predicted class.

    The counts of several models, predicted: (models, images) int, are summed.
    """
    pairs = np.broadcast_to(label, predicted.shape) * classes + predicted
    return np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)


def finite_mask(row: Mapping[str, Any]) -> list[bool]:
    """Per member, whether its losses in a line of metrics.jsonl are all finite (not None)."""
    losses = [np.ravel(value).tolist() for name, value in row.items() if name.endswith("/loss")]
    return [None not in member for member in zip(*losses, strict=True)]


def finite_members(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """A line of metrics.jsonl with each metric as a list over the members that are finite."""
    values, finite = {name: np.ravel(value) for name, value in row.items()}, finite_mask(row)
    return {name: (v[finite] if "/" in name else v).tolist() for name, v in values.items()}


def select_members(row: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """A line of metrics.jsonl of some members; of a single network as it is."""
    lists = {name: value for name, value in row.items() if isinstance(value, list)}
    return {**row, **{name: [value[i] for i in indices] for name, value in lists.items()}}


def member_means(row: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl with the means over the members that are finite; NaN if none is."""
    values = finite_members(row)
    return {name: sum(v) / len(v) if v else math.nan for name, v in values.items()}
