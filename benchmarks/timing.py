"""The timing harness, by the rules of docs/benchmarks.md, and what samples say. NumPy is enough."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STABLE = 0.1  # warm when two samples in a row differ by less than this share
GROWTH = 10  # a sample has at most this many times the steps of the one before
UNSTABLE = 0.1  # warn when the interquartile range exceeds this share of the median
DRIFT, FEWEST_FOR_DRIFT = 0.05, 8  # warn when the halves of so many samples differ by this share


def measure(
    call: Callable[[Any, int], Any],  # (state, steps) → state, runs that many steps
    state: Any,  # what it starts from
    *,
    sync: Callable[[Any], Any],  # waits for a state, as `jax.block_until_ready`; in the clock
    unit: int = 1,  # every call runs a multiple of this many steps
    samples: int = 20,  # how many to take, at least one
    budget_s: float = math.inf,  # how long all of them may last
    min_sample_s: float = 0.01,  # the least time of one; the number of steps aims at twice that
    warmup_s: tuple[float, float] = (0.0, 10.0),  # least and most after the first call
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Any], Any]:
    """Times `call`; returns the fields of a `Benchmark`, and the state after the last step.

    `samples_s` and `warmup_s`, the first call with its compilation included, are in seconds a step.
    Between its least and most time the warm-up ends when two samples in a row agree.
    """

    def timed(steps: int) -> float:
        nonlocal state
        started = clock()
        state = call(state, steps)
        sync(state)
        return clock() - started

    warmup = [timed(unit) / unit]
    steps, before_s, spent_s = unit, math.inf, 0.0
    while True:
        elapsed_s = timed(steps)
        spent_s += elapsed_s
        warmup.append(elapsed_s / steps)
        if elapsed_s < min_sample_s:
            wanted = math.ceil(2 * steps * min_sample_s / max(elapsed_s, 1e-9))
            steps = unit * math.ceil(min(max(wanted, steps + 1), GROWTH * steps) / unit)
            before_s = math.inf
            continue
        stable = abs(elapsed_s - before_s) <= STABLE * min(elapsed_s, before_s)
        if spent_s >= warmup_s[0 if stable else 1] and before_s < math.inf:  # one may be a stall
            break
        before_s = elapsed_s
    taken: list[float] = []
    gc.collect()
    gc.disable()
    try:
        while not taken or (len(taken) < samples and steps * sum(taken) < budget_s):
            taken.append(timed(steps) / steps)
    finally:
        gc.enable()
    return {"samples_s": taken, "warmup_s": warmup, "details": {"steps_per_sample": steps}}, state


def estimate(samples_s: Sequence[float], platform: str) -> float:
    """The one number for the samples of a process: the least on a CPU, elsewhere the median."""
    # On a CPU other work only adds to a time (Chen and Revels, 2016, arXiv:1608.04295).
    return float(min(samples_s) if platform == "cpu" else np.median(samples_s))


def spread(samples_s: Sequence[float]) -> float:
    """The interquartile range divided by the median."""
    low, median, high = np.quantile(samples_s, (0.25, 0.5, 0.75))
    return float((high - low) / median)


def warning(samples_s: Sequence[float]) -> str:
    """Why not to trust the samples, with numbers; empty if nothing says so."""
    found, n = [], len(samples_s)
    if (share := spread(samples_s)) > UNSTABLE:
        found.append(f"unstable: half of {n} samples span {share:.0%} of the median")
    if n >= FEWEST_FOR_DRIFT:
        change = np.median(samples_s[n // 2 :]) / np.median(samples_s[: n // 2]) - 1
        if abs(change) > DRIFT:
            found.append(f"drift: the second half is {change:+.0%} from the first")
    return "; ".join(found)


def modes(values: Sequence[float]) -> list[float]:
    """The median of the values, or two if they form two separate groups of at least two."""
    ordered = sorted(values)
    for k in range(2, len(ordered) - 1):
        low, high = ordered[:k], ordered[k:]
        gap, width = high[0] - low[-1], max(low[-1] - low[0], high[-1] - high[0])
        if gap > 3 * width and gap > 0.1 * np.median(ordered):  # they are separate
            return [float(np.median(low)), float(np.median(high))]
    return [float(np.median(ordered))]
