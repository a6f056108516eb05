"""The statistics, against values worked out elsewhere or by hand."""

import numpy as np
import pytest
import scipy

from mnist_jax.runs import statistics


def test_the_interval_of_a_mean_is_student_s():
    """t(0.975, 3) = 3.182446, from a table."""
    found = statistics.summarize([1.0, 2.0, 3.0, 4.0])
    assert found["mean"] == 2.5
    assert found["sd"] == pytest.approx(1.2909944)
    half = 3.182446 * 1.2909944 / 2
    assert found["ci95"] == pytest.approx([2.5 - half, 2.5 + half], rel=1e-6)
    assert (found["best"], found["worst"], found["n"]) == (4.0, 1.0, 4)


def test_one_value_and_none_say_what_they_can():
    one = statistics.summarize([0.5])
    assert (one["n"], one["mean"], one["sd"], one["ci95"]) == (1, 0.5, None, None)
    assert statistics.summarize([])["mean"] is None


def test_wilson_s_interval():
    """For 15 of 20: (x + z²/2 ± z √(x (n - x) / n + z²/4)) / (n + z²) with z = 1.959964."""
    low, high = statistics.binomial_ci95(15, 20)
    z, x, n = 1.959964, 15, 20
    half = z * (x * (n - x) / n + z**2 / 4) ** 0.5
    assert [low, high] == pytest.approx(
        [(x + z**2 / 2 - half) / (n + z**2), (x + z**2 / 2 + half) / (n + z**2)], rel=1e-6
    )


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (7, 7), (9934, 10_000), (1, 360)])
def test_the_interval_and_the_exact_test_agree_with_scipy_s(correct, count):
    test = scipy.stats.binomtest(correct, count)
    expected = test.proportion_ci(method="wilson")
    assert statistics.binomial_ci95(correct, count) == pytest.approx(expected, abs=1e-12)
    right = np.arange(count) < correct
    assert statistics.mcnemar(right, ~right)["p"] == pytest.approx(test.pvalue, abs=1e-12)


def test_mcnemar_counts_only_where_the_two_differ():
    """1 against 5 of 6: p = 2 · (1 + 6) / 64."""
    a = np.array([1, 0, 0, 0, 0, 0, 1, 1, 0], bool)
    b = np.array([0, 1, 1, 1, 1, 1, 1, 1, 0], bool)
    found = statistics.mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (1, 5)
    assert found["p"] == pytest.approx(14 / 64)
    assert statistics.mcnemar(a, a)["p"] == 1.0


def test_welch_agrees_with_the_formula():
    """t = 2 / √(1/3 + 4/3), 2.94 degrees of freedom; p by a t-distribution's table function."""
    found = statistics.welch(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    assert found["difference"] == 2.0
    assert found["p"] == pytest.approx(0.2206, abs=2e-3)
    assert found["ci95"][0] < 0 < 2 < found["ci95"][1]
    same = np.array([0.5, 0.5])
    assert statistics.welch(same, same)["p"] == 1.0
    assert statistics.welch(same, same + 1)["p"] == 0.0


def test_calibration_error_by_hand():
    """Of four images at 0.9 two are right, of four at 0.6 three: (4 · 0.4 + 4 · 0.15) / 8."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 4)
    label = np.array([0, 0, 1, 1, 0, 0, 0, 1])
    assert statistics.calibration_error(probabilities, label) == pytest.approx(0.275)


def test_bins_hold_every_answer_of_every_model():
    probabilities = np.array([[[1.0, 0.0], [0.4, 0.6]], [[0.45, 0.55], [0.0, 1.0]]])
    bins = statistics.calibration_bins(probabilities, np.array([0, 0]), bins=4)
    assert bins.images.tolist() == [0, 0, 2, 2]  # 1 belongs to the last one
    assert bins.correct.tolist() == [0, 0, 0, 1]
    assert bins.confidence.tolist() == pytest.approx([0, 0, 1.15, 2.0])


def test_confusion_counts_every_model_s_answers():
    found = statistics.confusion(np.array([[0, 1, 1], [0, 0, 2]]), np.array([0, 1, 2]), 3)
    assert found.tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_the_most_confident_errors_come_first():
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    label = np.array([0, 0, 0, 0, 1])
    assert statistics.most_confident_errors(probabilities, label, 3).tolist() == [2, 1, 3]
    assert statistics.most_confident_errors(probabilities[:1], label[:1], 3).tolist() == []
