"""The statistics, against values from tables or worked out by hand."""

import numpy as np
import pytest

from mnist_jax.runs import statistics


def test_summary_of_seeds():
    """t(0.975, 3) = 3.182446, from a table."""
    found = statistics.summarize([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * 1.2909944 / 2
    assert (found["n"], found["mean"], found["best"], found["worst"]) == (4, 2.5, 4.0, 1.0)
    assert found["sd"] == pytest.approx(1.2909944)
    assert found["ci95"] == pytest.approx([2.5 - half, 2.5 + half], rel=1e-6)
    one = statistics.summarize([0.5])
    assert (one["n"], one["mean"], one["sd"], one["ci95"]) == (1, 0.5, None, None)
    assert statistics.summarize([])["mean"] is None


def test_accuracy_and_its_interval():
    """Wilson: (x + z²/2 ± z √(x (n - x) / n + z²/4)) / (n + z²) with z = 1.959964."""
    found = statistics.accuracy(np.arange(20) < 15, np.ones(20, bool))
    assert (found["correct"], found["count"], found["accuracy"]) == (15, 20, 0.75)
    z, x, n = 1.959964, 15, 20
    half = z * (x * (n - x) / n + z**2 / 4) ** 0.5
    ends = [(x + z**2 / 2 + sign * half) / (n + z**2) for sign in (-1, 1)]
    assert found["ci95"] == pytest.approx(ends, rel=1e-6)
    label = np.ones(7, bool)
    assert statistics.accuracy(~label, label)["ci95"][0] == 0
    assert statistics.accuracy(label, label)["ci95"][1] == 1


def test_mcnemar_counts_only_images_on_which_the_two_differ():
    """1 against 5 of 6: p = 2 · (1 + 6) / 64."""
    a = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0], bool)
    b = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0], bool)
    assert statistics.mcnemar(a, b) == {"only_a": 1, "only_b": 5, "p": pytest.approx(14 / 64)}
    assert statistics.mcnemar(a, a)["p"] == 1.0


def test_welch():
    """Mean 2 and 4, variance 1 and 4: t = 2 / √(5/3) with 50/17 degrees of freedom."""
    found = statistics.welch(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert found["difference"] == 2.0
    assert found["p"] == pytest.approx(0.2206, abs=2e-3)
    low, high = found["ci95"]
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(3.22 * (5 / 3) ** 0.5, rel=5e-3)
    half = np.array([0.5, 0.5])
    assert statistics.welch(half, np.array([0.5, 0.6]))["p"] == pytest.approx(0.5)  # t(1) = 1
    assert statistics.welch(half, half) == {"difference": 0.0, "ci95": [0.0, 0.0], "p": 1.0}
    assert statistics.welch(np.full(2, 0.1), np.full(6, 0.1))["p"] == 1  # the means are not equal
    assert statistics.welch(half, half + 1) == {"difference": 1.0, "ci95": [1.0, 1.0], "p": 0.0}
