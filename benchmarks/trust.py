"""Whether `benchmarks.compare` can be believed: what it says of a slow-down, and of none.

    python -m benchmarks.trust --output FILE

Half of the comparisons set a command against itself, the other half against the same with a
training step made a tenth slower on purpose. Each comparison starts either command seven times, in
turn. Wanted: at least 19 of 20 slow-downs found, at most one alarm in 20 without.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import compare, launch, results
from benchmarks.results import Recorder
from mnist_jax.errors import WorseError

FOUND, ALARMS = 0.95, 0.05  # wanted shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags."""

    output: Path | None = None
    """Result file, in JSON. None: only print."""
    model: launch.Model = "mlp"
    """The network whose training step is slowed."""
    slow_down: float = 0.1
    """Share by which that step is made slower."""
    comparisons: int = 20
    """Comparisons with the slower step, and as many without."""
    launches: int = compare.LAUNCHES
    """Processes on either side of a comparison."""
    threshold: float = 0.05
    """Share by which a step may be slower, as in benchmarks.compare."""
    repeats: int = 10
    """Samples in each process."""
    again: Path | None = None
    """Measure nothing, and judge what is in this file again, as benchmarks.compare does now."""

    def __post_init__(self):
        launch.check_options(self)


def measure(options: Options) -> None:
    """Makes all comparisons, the two kinds in turn; writes the file after each, or judges again.

    Raises:
        WorseError: fewer slow-downs were found, or more alarms raised, than is wanted.
    """
    here = launch.where("auto")
    if options.again is not None:
        found = results.read(options.again)
        judged = {"judged_by_commit": here["git_commit"]}
        recorder = Recorder(options.output, found.context | judged)
        for row in found.tables["trust"]:
            recorder.row("trust", **row | judge(row, options.threshold)._asdict())
        recorder.write()
        return conclude(recorder, options.slow_down)
    recorder = Recorder(options.output, here)
    flags = f"--model {options.model} --mode many --what train --repeats={options.repeats}"
    worker = f"{sys.executable} -m benchmarks.peer_workers.slowed"
    plain, slowed = (f"{worker} {share} {flags}" for share in (0.0, options.slow_down))
    for number in range(options.comparisons):
        for planted in (False, True):
            a, b = compare.interleaved((plain, slowed if planted else plain), options.launches)
            [verdict] = compare.compare(a, b, options.threshold).values()
            samples = {
                f"{name}_s": [benchmark.samples_s for benchmark in side.benchmarks]
                for name, side in (("a", a), ("b", b))
            }
            recorder.row("trust", planted=planted, **verdict._asdict(), **samples)
            launch.say(f"{number + 1}, {'slowed' if planted else 'alike'}: {verdict}")
            recorder.write()
    return conclude(recorder, options.slow_down)


def judge(row: dict[str, Any], threshold: float) -> compare.Verdict:
    """What `benchmarks.compare` says of the samples in a row of the file."""
    a, b = ([compare.of_launch(samples_s) for samples_s in row[side]] for side in ("a_s", "b_s"))
    return compare.decide(a, b, threshold)


def conclude(recorder: Recorder, slow_down: float) -> None:
    """Counts what was found.

    Raises:
        WorseError: too few slow-downs, or too many alarms.
    """
    rows = recorder.tables["trust"]
    comparisons = sum(row["planted"] for row in rows)
    counts = {
        True: sum(row["word"] == "slower" for row in rows if row["planted"]),
        False: sum(row["word"] != "same" for row in rows if not row["planted"]),
    }
    print(f"slow-downs of {slow_down:.0%} found: {counts[True]} of {comparisons}")
    print(f"alarms without one: {counts[False]} of {comparisons}")
    few = counts[True] < math.floor(FOUND * comparisons)
    if few or counts[False] > math.ceil(ALARMS * comparisons):
        raise WorseError("the comparison is not to be trusted on this machine as it is")


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.trust", __doc__ or ""))
