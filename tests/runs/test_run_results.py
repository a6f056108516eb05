"""Lines of metrics.jsonl, and the counts in result.json."""

import numpy as np

from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.runs.results import evaluation, metrics_row


def make_metrics(loss_sum, *, correct=1, count=2) -> Metrics:
    integers = (np.int32(value) for value in (correct, count, NEVER))
    return Metrics(np.float32(loss_sum), *integers)


def test_a_loss_that_is_not_finite_is_none():
    row = metrics_row({"train": make_metrics(np.inf), "test": make_metrics([3, np.nan])})
    assert row["train/loss"] is None
    assert row["test/loss"] == [1.5, None]
    assert row["train/accuracy"] == 0.5


def test_counts_are_recorded_of_all_splits_but_train():
    found = {"train": make_metrics(1), "test": make_metrics([1, 1], correct=[1, 2], count=[2, 2])}
    values = evaluation(found)
    assert (values["test_correct"], values["test_count"]) == ([1, 2], 2)
    assert "train_correct" not in values
