"""The harness under a clock that only moves when told to, and what it says of samples."""

import gc

import pytest

from benchmarks import timing


class Device:
    """Runs steps on a clock of its own; a call's work is done when it is waited for."""

    def __init__(self, *step_times_s, compiles_s=0.0):
        self.now_s = self.pending_s = 0.0
        self.step_times_s, self.compiles_s = list(step_times_s), compiles_s
        self.calls: list[int] = []
        self.collecting: list[bool] = []

    def call(self, state: list, steps: int) -> list:
        assert state.pop() == "alive", "a donated state was used again"
        times = self.step_times_s
        self.pending_s += steps * (times.pop(0) if len(times) > 1 else times[0])
        if steps not in self.calls:
            self.pending_s += self.compiles_s
        self.calls.append(steps)
        self.collecting.append(gc.isenabled())
        return ["alive"]

    def sync(self, state: list) -> None:
        self.now_s += self.pending_s
        self.pending_s = 0.0

    def measure(self, **options) -> dict:
        clock = lambda: self.now_s  # noqa: E731
        return timing.measure(self.call, ["alive"], sync=self.sync, clock=clock, **options)[0]


def test_compilation_stays_in_the_warm_up():
    device = Device(5.0, 0.02)
    times = device.measure(samples=4)
    assert times["warmup_s"] == pytest.approx([5.0, 0.02, 0.02])
    assert times["samples_s"] == pytest.approx([0.02] * 4)
    assert times["details"]["steps_per_sample"] == 1
    assert not any(device.collecting[-4:]) and gc.isenabled()


def test_calls_are_multiples_of_the_unit_and_lengths_are_compiled_in_the_warm_up():
    device = Device(2e-4, compiles_s=5.0)
    times = device.measure(samples=3, unit=30)
    assert all(steps % 30 == 0 for steps in device.calls)
    assert times["details"]["steps_per_sample"] * 2e-4 >= 0.01
    assert times["samples_s"] == pytest.approx([2e-4] * 3)


@pytest.mark.parametrize(
    ("step_times_s", "options", "warmed_s"),
    [
        ((1.0, 0.08, 0.05, 0.03, 0.021, 0.02), {}, (0.201, 0.23)),  # until two samples agree
        ((1.0, *([0.2, 0.1] * 20)), {"warmup_s": (0.0, 1.0)}, (1.0, 1.21)),  # or time is up
        ((1.0, 20.0, 1e-3), {}, (20.002, 20.01)),  # but not a stall
        ((1.0, 0.02), {"warmup_s": (0.5, 9.0)}, (0.5, 0.53)),  # but for the least time
    ],
)
def test_the_length_of_the_warm_up(step_times_s, options, warmed_s):
    times = Device(*step_times_s).measure(samples=1, **options)
    assert warmed_s[0] <= sum(times["warmup_s"][1:]) <= warmed_s[1]


def test_every_sample_is_kept_and_the_budget_ends_them():
    outlier = [0.02, 3.0, 0.02, 0.02]
    found = Device(1.0, 0.02, 0.02, *outlier).measure(samples=4)
    assert found["samples_s"] == pytest.approx(outlier)
    for options, count in (({}, 9), ({"budget_s": 1.0}, 2), ({"budget_s": 0.0}, 1)):
        assert len(Device(1.0, 0.5).measure(samples=9, **options)["samples_s"]) == count


def test_the_estimate_is_the_least_on_a_cpu_and_the_median_elsewhere():
    samples = [3.0, 1.0, 2.0, 9.0]
    assert timing.estimate(samples, "cpu") == 1.0
    assert timing.estimate(samples, "gpu") == 2.5


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([1.0, 1.01, 0.99, 1.0, 1.02, 50.0], []),
        ([1.0, 2.0, 3.0], ["unstable: half of 3 samples span 50% of the median"]),
        ([1.0] * 5 + [0.93] * 5, ["drift: the second half is -7% from the first"]),
    ],
)
def test_warnings_quote_their_numbers(samples, words):
    assert timing.warning(samples) == "; ".join(words)
