"""The timing harness: warm-up, samples, and what samples say. It needs NumPy only.

A sample is one reading of the clock around as many steps as last `min_sample_s`, ended by a wait
for all outputs. Compilation falls into the warm-up, which is kept apart. No sample is dropped.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

State = TypeVar("State")

STABLE = 0.1  # warm when two samples in a row differ by less than this share
GROWTH = 10  # a sample has at most this many times the steps of the one before
UNSTABLE = 0.1  # warn when the interquartile range exceeds this share of the median
DRIFT, FEWEST_FOR_DRIFT = 0.05, 8  # warn when the halves of so many samples differ by this share


class Timing(NamedTuple):
    """The times of one thing, in seconds a step, each in order; `warmup_s` has the first call."""

    warmup_s: list[float]
    samples_s: list[float]
    steps_per_sample: int


def measure(
    call: Callable[[State, int], State],
    state: State,
    *,
    sync: Callable[[State], Any],
    unit: int = 1,
    samples: int = 20,
    min_samples: int = 1,
    budget_s: float = math.inf,
    min_sample_s: float = 0.01,
    warmup_s: tuple[float, float] = (0.0, 10.0),
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, State]:
    """Times `call`; returns the times, and the state after the last step.

    Args:
        call: (state, steps) → state, runs that many steps. It may donate the state it is given;
            the returned one replaces it.
        state: what the first call starts from.
        sync: returns when everything in a state has been computed, such as
            `jax.block_until_ready`; inside the clock.
        unit: every call runs a multiple of this many steps.
        samples: how many samples to take.
        min_samples: take this many even if they exceed the budget.
        budget_s: start no further sample when the samples so far last this long together.
        min_sample_s: a sample lasts at least this long; the number of steps aims at twice that.
        warmup_s: the least and the most time of the warm-up after the first call. Between them it
            ends when two samples in a row agree.
        clock: seconds from any fixed moment.
    """

    def timed(steps: int) -> float:
        nonlocal state
        started = clock()
        state = call(state, steps)
        sync(state)
        return clock() - started

    def grown(steps: int, elapsed_s: float) -> int:
        wanted = math.ceil(2 * steps * min_sample_s / max(elapsed_s, 1e-9))
        return unit * math.ceil(min(max(wanted, steps + 1), GROWTH * steps) / unit)

    warmup = [timed(unit) / unit]
    steps, before_s, spent_s = unit, math.inf, 0.0
    while True:
        elapsed_s = timed(steps)
        spent_s += elapsed_s
        warmup.append(elapsed_s / steps)
        if elapsed_s < min_sample_s:
            steps, before_s = grown(steps, elapsed_s), math.inf
            continue
        stable = abs(elapsed_s - before_s) <= STABLE * min(elapsed_s, before_s)
        if spent_s >= warmup_s[1] or (stable and spent_s >= warmup_s[0]):
            break
        before_s = elapsed_s

    taken: list[float] = []
    spent_s, collecting = 0.0, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while len(taken) < samples and (len(taken) < min_samples or spent_s < budget_s):
            elapsed_s = timed(steps)
            if elapsed_s < min_sample_s:  # the program was not warm: start again, longer
                warmup += [*taken, elapsed_s / steps]
                taken, spent_s, steps = [], 0.0, grown(steps, elapsed_s)
                continue
            taken.append(elapsed_s / steps)
            spent_s += elapsed_s
    finally:
        if collecting:
            gc.enable()
    return Timing(warmup, taken, steps), state


def estimate(samples_s: Sequence[float], platform: str) -> float:
    """The one number for the samples of a process: the least on a CPU, elsewhere the median.

    On a CPU other work only adds to a time, so the least sample varies least between processes
    (Chen and Revels, "Robust benchmarking in noisy environments", 2016). A GPU is fastest before
    it is warm, so there the least sample shows a clock rate that does not last. The card, the
    tables and the verdicts all use this estimate.
    """
    return float(min(samples_s) if platform == "cpu" else np.median(samples_s))


class Summary(NamedTuple):
    """Median and interquartile range, and why not to trust the samples; "" if nothing says so."""

    median_s: float
    iqr_s: float
    warning: str


def summarize(samples_s: Sequence[float]) -> Summary:
    """Median, spread and warnings of one or more samples."""
    low, median, high = np.quantile(samples_s, (0.25, 0.5, 0.75))
    warnings, n = [], len(samples_s)
    if high - low > UNSTABLE * median:
        share = f"{(high - low) / median:.0%} of the median"
        warnings.append(f"unstable: half of {n} samples span {low:.3g} to {high:.3g} s, {share}")
    if n >= FEWEST_FOR_DRIFT:
        change = np.median(samples_s[n // 2 :]) / np.median(samples_s[: n // 2]) - 1
        if abs(change) > DRIFT:
            warnings.append(f"drift: the second half is {change:+.0%} from the first")
    return Summary(float(median), float(high - low), "; ".join(warnings))


def interval95(values: Sequence[float]) -> tuple[float, float] | None:
    """Two of the values that enclose the median of their distribution in at least 95 % of cases.

    Exact for independent values of any distribution (order statistics); None for fewer than 6.
    """
    n, tail, k = len(values), 0.0, 0
    while (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else None


def modes(values: Sequence[float]) -> list[float]:
    """The median of the values, or two if they form two separate groups of at least two.

    Separate: the gap is three times the width of either group and a tenth of the median.
    """
    ordered = sorted(values)
    for k in range(2, len(ordered) - 1):
        low, high = ordered[:k], ordered[k:]
        gap, width = high[0] - low[-1], max(low[-1] - low[0], high[-1] - high[0])
        if gap > 3 * width and gap > 0.1 * np.median(ordered):
            return [float(np.median(low)), float(np.median(high))]
    return [float(np.median(ordered))]


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The median, least and greatest of a[i] / b[i]; both sides of a round i ran in turn."""
    ratios = np.divide(a, b)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())
