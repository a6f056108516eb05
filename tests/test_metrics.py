"""Metrics are sums, merged and divided once."""

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.runs.results import evaluation


def sums(loss_sum, correct, count, first_nonfinite=NEVER) -> Metrics:
    values = jnp.int32(correct), jnp.int32(count), jnp.int32(first_nonfinite)
    return Metrics(jnp.float32(loss_sum), *values)


def test_means_are_divided_once_by_the_number_of_examples_in_float64():
    merged = sums(8, 4, 4).merge(sums(1, 0, 1, 7)).merge(sums(0, 0, 0, 3))
    assert (merged.loss, merged.accuracy, merged.first_nonfinite) == (9 / 5, 4 / 5, 3)
    assert (Metrics.zeros().loss, Metrics.zeros().accuracy) == (0, 0)
    for correct in (1, 7, 59_999):
        assert sums(0, correct, 60_000).accuracy == correct / 60_000


def test_an_ensemble_has_a_number_per_member_and_none_for_a_loss_that_is_not_finite():
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), sums(3, 1, 2), sums(np.nan, 2, 2))
    merged = Metrics.zeros(2).merge(two)
    row, _ = evaluation({"train": sums(np.inf, 1, 2), "test": merged})
    losses = {"train/loss": None, "test/loss": [1.5, None]}
    assert row == {**losses, "train/accuracy": 0.5, "test/accuracy": [0.5, 1]}
    assert [x.dtype for x in jax.tree.leaves(merged)] == [np.float32, *[np.int32] * 3]
