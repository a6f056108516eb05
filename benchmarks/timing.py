"""The one timing harness: what is inside the clock, how often, and what the samples say.

A sample is one reading of the clock around a call that runs several steps, plus the wait until
all of its outputs exist. How many steps is settled while warming up, so that a sample lasts at
least 10 ms: of it the harness itself (`overhead_s`) takes some microseconds, which are measured and
not subtracted. Compilation and whatever else only the first calls pay
falls into the warm-up, whose times are kept apart. No sample is ever dropped.

Needs NumPy and nothing else, so that it runs inside every framework's process.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

State = TypeVar("State")

MIN_SAMPLE_S = 0.01
STABLE = 0.1  # warm once two samples in a row differ by less than this share
GROWTH = 10  # a sample has at most this many times the steps of the one before
UNSTABLE = 0.1  # an interquartile range above this share of the median brings a warning
RESAMPLES = 2000


class Timing(NamedTuple):
    """The times of one thing measured, in seconds a step.

    Attributes:
        warmup_s: each sample of the warm-up, the first call included, in order.
        samples_s: every sample after it, in order.
        steps_per_sample: steps inside each of `samples_s`.
    """

    warmup_s: list[float]
    samples_s: list[float]
    steps_per_sample: int

    def per(self, steps: int) -> "Timing":
        """The same samples in seconds for `steps` steps, such as the batches of an evaluation."""
        return Timing(
            [sample * steps for sample in self.warmup_s],
            [sample * steps for sample in self.samples_s],
            self.steps_per_sample // steps,
        )


def measure(
    call: Callable[[State, int], State],
    state: State,
    *,
    sync: Callable[[State], Any],
    samples: int = 20,
    budget_s: float = math.inf,
    min_sample_s: float = MIN_SAMPLE_S,
    warmup_s: float = 10.0,
    multiple_of: int = 1,
    any_length: bool = False,
    whole: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Timing, State]:
    """Times `call` until it has `samples` samples, or at least one and no budget left.

    Args:
        call: (state, steps) → state, running that many steps. It may donate the state it is given:
            the one returned takes its place.
        state: what the first call starts from.
        sync: returns once everything in a state has been computed, such as
            `jax.block_until_ready`; inside the clock.
        samples: how many are wanted.
        budget_s: no sample is begun once those taken last this long together.
        min_sample_s: a sample lasts at least this long; its steps are set to last about twice that.
        warmup_s: the warm-up after the first call ends after this, stable or not.
        multiple_of: a sample is a multiple of this many steps (one of the warm-up need not be).
        any_length: whether a number of steps met for the first time needs no warming.
        whole: whether the warm-up, too, is of multiples of `multiple_of` only, because every number
            of steps is compiled.
        clock: seconds from any fixed moment.

    Returns:
        The times, and the state after the last step.
    """

    def timed(steps: int) -> float:
        nonlocal state
        started = clock()
        state = call(state, steps)
        sync(state)
        return clock() - started

    def grown(steps: int, elapsed_s: float) -> int:
        """Steps enough for the next sample."""
        if elapsed_s >= min_sample_s:
            return steps
        wanted = math.ceil(2 * steps * min_sample_s / max(elapsed_s, 1e-9))
        return min(max(wanted, steps + 1), GROWTH * steps)

    def rounded(steps: int, unit: int = multiple_of) -> int:
        return math.ceil(steps / unit) * unit

    unit = multiple_of if whole else 1
    warmup = [timed(unit) / unit]  # in seconds a step
    steps, before_s, spent_s = unit, math.inf, 0.0
    while spent_s < warmup_s:
        elapsed_s = timed(steps)
        spent_s += elapsed_s
        warmup.append(elapsed_s / steps)
        if (more := rounded(grown(steps, elapsed_s), unit)) > steps:
            steps, before_s = more, math.inf
        elif abs(elapsed_s - before_s) <= STABLE * min(elapsed_s, before_s):
            break
        else:
            before_s = elapsed_s

    warm_steps, steps = steps, rounded(steps)
    samples_s: list[float] = []
    spent_s = 0.0
    while len(samples_s) < samples and (not samples_s or spent_s < budget_s):
        if steps != warm_steps and not any_length:  # it may be compiled first
            warmup.append(timed(steps) / steps)
            warm_steps = steps
        elapsed_s = timed(steps)
        spent_s += elapsed_s
        samples_s.append(elapsed_s / steps)
        more = rounded(grown(steps, elapsed_s))
        if more > steps:
            # It was not warm, and has become faster since. What was taken joins the warm-up.
            warmup += samples_s
            steps, samples_s, spent_s = more, [], 0.0
    return Timing(warmup, samples_s, steps), state


def overhead_s(state: Any, sync: Callable[[Any], Any], samples: int = 1000) -> float:
    """What the harness itself takes of a sample, in seconds: the median of samples of no steps.

    Args:
        state: what `measure` was given, with everything in it computed.
        sync: as for `measure`.
        samples: how many.
    """
    times, _ = measure(lambda state, _: state, state, sync=sync, samples=samples, min_sample_s=0.0)
    return float(np.median(times.samples_s))


class Summary(NamedTuple):
    """What samples say.

    Attributes:
        median_s: their median.
        iqr_s: their interquartile range.
        ci95_s: a 95 % bootstrap confidence interval of the median.
        warning: with its numbers, when the samples spread too far to be trusted; else "".
    """

    median_s: float
    iqr_s: float
    ci95_s: list[float]
    warning: str


def summarize(samples_s: Sequence[float]) -> Summary:
    """Median, spread and confidence of at least one sample. The same samples, the same answer."""
    samples = np.asarray(samples_s)
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    draws = np.random.default_rng(0).choice(samples, (RESAMPLES, len(samples)))
    ci95 = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    warning = ""
    if high - low > UNSTABLE * median:
        warning = (
            f"unstable: the middle half of {len(samples)} samples spans {low:.3g} to {high:.3g} s, "
            f"{(high - low) / median:.0%} of the median"
        )
    return Summary(float(median), float(high - low), ci95.tolist(), warning)


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The median of a over that of b, and the ends of its 95 % bootstrap confidence interval.

    Of samples taken in turn, as many of either: sample i of both is of round i. Rounds are drawn,
    never samples alone, so that what slows a round as a whole cancels out.
    """
    sides = np.asarray(a), np.asarray(b)
    rounds = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    above, below = (np.median(side[rounds], axis=1) for side in sides)
    low, high = np.quantile(above / below, (0.025, 0.975))
    return float(np.median(a) / np.median(b)), float(low), float(high)
