"""Metrics are sums, merged and divided once; members that diverged are excluded."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax.metrics import NEVER, Metrics, finite_mask, finite_members, member_means
from mnist_jax.runs.results import evaluation

ROW = {"epoch": 1, "train/loss": [0.5, None, 0.3], "test/loss": [0.4, 0.1, None]}
ROW |= {"test/accuracy": [0.9, 0.1, 0.8], "train_s": 2.0}


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
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(merged)]
    assert dtypes == [np.float32, np.int32, np.int32, np.int32]


def test_members_that_diverged_are_excluded_and_a_single_network_is_one_member():
    assert finite_mask(ROW) == [True, False, False]
    finite = finite_members(ROW)
    assert (finite["train/loss"], finite["test/accuracy"]) == ([0.5], [0.9])
    assert member_means(ROW)["test/accuracy"] == 0.9
    row = {"epoch": 1, "test/loss": 0.25, "test/accuracy": 0.5}
    assert finite_members(row)["test/loss"] == [0.25]
    assert member_means(row)["test/accuracy"] == 0.5
    assert math.isnan(member_means({**row, "test/loss": None})["test/accuracy"])
