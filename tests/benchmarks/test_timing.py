"""The harness under a clock that only moves when told to."""

import numpy as np
import pytest

from benchmarks import timing


class Device:
    """Runs steps on a clock of its own; a call's work is only done once it is waited for."""

    def __init__(self, step_times_s):
        self.now_s = 0.0
        self.pending_s = 0.0
        self.step_times_s = iter(step_times_s)
        self.calls: list[int] = []

    def clock(self) -> float:
        return self.now_s

    def call(self, state: list, steps: int) -> list:
        assert state.pop() == "alive", "a donated state was used again"
        self.calls.append(steps)
        self.pending_s += steps * next(self.step_times_s)
        return ["alive"]

    def sync(self, state: list) -> None:
        self.now_s += self.pending_s
        self.pending_s = 0.0

    def measure(self, **options) -> timing.Timing:
        state = ["alive"]
        return timing.measure(self.call, state, sync=self.sync, clock=self.clock, **options)[0]


def steady(step_time_s: float, first_s: float):
    yield first_s
    while True:
        yield step_time_s


def test_the_compilation_stays_in_the_warm_up():
    times = Device(steady(0.02, first_s=5.0)).measure(samples=4)
    assert times.warmup_s == pytest.approx([5.0, 0.02, 0.02])
    assert times.samples_s == pytest.approx([0.02] * 4)
    assert times.steps_per_sample == 1


def test_where_every_number_of_steps_is_compiled_few_are_asked_for():
    device = Device(steady(2e-4, first_s=1.0))
    times = device.measure(samples=3, multiple_of=30, whole=True)
    assert set(device.calls) == {30, 120}  # 6 ms, then at least twice 10
    assert times.steps_per_sample == 120
    assert times.samples_s == pytest.approx([2e-4] * 3)


def test_a_sample_has_steps_enough_to_last_ten_milliseconds():
    device = Device(steady(1e-5, first_s=1.0))
    times = device.measure(samples=3)
    assert times.samples_s == pytest.approx([1e-5] * 3)
    assert times.steps_per_sample * 1e-5 >= timing.MIN_SAMPLE_S
    assert device.calls[-3:] == [times.steps_per_sample] * 3


def test_a_number_of_steps_met_for_the_first_time_is_kept_in_the_warm_up():
    class Compiles(Device):
        def call(self, state, steps):
            if steps not in self.calls:
                self.pending_s += 5.0
            return super().call(state, steps)

    times = Compiles(steady(1e-3, first_s=1e-3)).measure(samples=3, multiple_of=7)
    assert times.steps_per_sample % 7 == 0
    assert times.samples_s == pytest.approx([1e-3] * 3)


def test_warming_up_lasts_until_two_samples_agree_or_time_is_up():
    def slow_start():
        yield from (1.0, 0.08, 0.05, 0.03, 0.021)
        while True:
            yield 0.02

    assert Device(slow_start()).measure(samples=2).samples_s == pytest.approx([0.02] * 2)

    def restless():
        while True:
            yield from (0.2, 0.1)

    times = Device(restless()).measure(samples=2, warmup_s=1.0)
    assert 1.0 <= sum(times.warmup_s[1:]) < 1.5


def test_samples_too_short_for_the_clock_are_kept_in_the_warm_up():
    def held_up_at_first():
        yield from [0.05] * 4
        while True:
            yield 1e-4

    times = Device(held_up_at_first()).measure(samples=3)
    assert times.warmup_s[:4] == pytest.approx([0.05] * 4)
    assert times.samples_s == pytest.approx([1e-4] * 3)
    assert times.steps_per_sample * 1e-4 >= timing.MIN_SAMPLE_S


def test_every_sample_is_kept_and_the_budget_ends_them():
    def one_outlier():
        yield from (1.0, 0.02, 0.02)
        yield from (0.02, 3.0, 0.02, 0.02)

    assert Device(one_outlier()).measure(samples=4).samples_s == pytest.approx(
        [0.02, 3.0, 0.02, 0.02]
    )
    assert len(Device(steady(0.5, first_s=1)).measure(samples=9, budget_s=1.0).samples_s) == 2
    assert len(Device(steady(0.5, first_s=1)).measure(samples=9, budget_s=0.0).samples_s) == 1


def test_samples_of_whole_evaluations():
    times = Device(steady(0.001, first_s=1)).measure(samples=2, multiple_of=40)
    assert times.steps_per_sample == 40
    whole = times.per(40)
    assert whole.samples_s == pytest.approx([0.04, 0.04])
    assert whole.steps_per_sample == 1


def test_the_summary_is_robust_repeatable_and_says_when_not_to_trust_it():
    samples = [1.0, 1.01, 0.99, 1.0, 1.02, 50.0]
    summary = timing.summarize(samples)
    assert summary == timing.summarize(samples)
    assert summary.median_s == pytest.approx(1.005)
    assert summary.iqr_s == pytest.approx(0.0175)
    assert 0.99 <= summary.ci95_s[0] <= summary.median_s <= summary.ci95_s[1]
    assert not summary.warning
    warning = timing.summarize([1.0, 2.0, 3.0]).warning
    assert "unstable" in warning
    assert "1.5 to 2.5 s, 50%" in warning


def test_the_confidence_interval_covers_the_median_about_as_often_as_it_claims():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        low, high = timing.summarize(rng.exponential(1.0, 30).tolist()).ci95_s
        hits += low <= np.log(2) <= high
    assert hits >= 85
