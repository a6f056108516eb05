"""Says whether B is slower than A; exits with 7 if it is.

    python -m benchmarks.compare A.json B.json
    python -m benchmarks.compare --run 'python -m benchmarks.step --model mlp' 'COMMAND B'
    python -m benchmarks.compare --self_test

A and B are result files or folders of cards; docs/benchmarks.md describes the test. --run adds
--output to the commands and starts them in turn. --self_test compares a step --rounds times with
itself and with the same made slower by --slow_down.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import mannwhitneyu, wilcoxon

from benchmarks import launch, results, step, timing
from benchmarks.results import Recorder, Results, say
from mnist_jax.errors import UsageError, WorseError

LAUNCHES = 11  # of a pair of commands: one round of them may contradict the others
FEWEST = 9  # launches of either side, for a verdict
SIGNIFICANT, CI95 = 0.05, (0.025, 0.975)
CARD_CASES = 6  # what a card measures in so many launches: step and evaluation of three networks
WANTED, ALLOWED = 0.95, 0.05  # shares of slow-downs found and of false alarms in --self_test
IGNORED = ("command", "date", "excluded", "load", "gpu", "parts", "variables")
IGNORED += launch.CACHE_VARIABLES
Sides = tuple[Sequence[float], Sequence[float]]


class Verdict(NamedTuple):
    """What the launches of two sides say."""

    ratio: float  # the median of B's times divided by A's of the same round; or of their medians
    ci95: Sequence[float]  # exact for rounds, else a bootstrap over launches; empty for few
    p: float  # by Holm, if B is not slower (for a ratio below 1, not faster) than the threshold
    word: str  # slower, faster, same, or few if there are too few launches for any verdict


def rank_p(a: Sequence[float], b: Sequence[float], *, paired: bool) -> float:
    """The probability of ranks so far apart if b is not greater than a; exact without ties."""
    if not paired:
        method = "auto" if len({*a, *b}) < len(a) + len(b) else "exact"  # auto if there are ties
        return float(mannwhitneyu(b, a, alternative="greater", method=method).pvalue)
    differences = np.log(b) - np.log(a)
    found: Any = wilcoxon(differences, alternative="greater") if differences.any() else None
    return float(found.pvalue) if found else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values, each to be compared with the level for all of them together."""
    order = np.argsort(values)
    raised = np.asarray(values)[order] * (len(values) - np.arange(len(values)))
    return np.minimum(1.0, np.maximum.accumulate(raised))[np.argsort(order)].tolist()


def judge(
    sides: Mapping[Any, Sides], threshold: float, *, paired: bool, family: int = 0
) -> dict[Any, Verdict]:
    """The verdict on each comparison, by the times of the launches of A and of B.

    B may be slower by the share `threshold`. `paired`: launch i of A ran beside launch i of B.
    Judges as if there were at least `family` comparisons with `FEWEST` launches a side.
    """
    found, rng, grown = {}, np.random.default_rng(0), 1 + threshold
    judged = [key for key, launches_s in sides.items() if min(map(len, launches_s)) >= FEWEST]
    adjusted: dict[tuple[Any, bool], float] = {}
    for is_slower in (True, False):
        pairs = [sides[key][:: 1 if is_slower else -1] for key in judged]
        values = [rank_p(a, [x / grown for x in b], paired=paired) for a, b in pairs]
        values = holm(values + [1.0] * (family - len(judged)))
        adjusted |= {(key, is_slower): p for key, p in zip(judged, values, strict=False)}
    for key, (a, b) in sides.items():
        if paired:
            ratios = np.divide(b, a).tolist()
            ratio, ci95 = float(np.median(ratios)), results.interval95(ratios)
        else:
            drawn = (rng.choice(x, (10_000, len(x))) for x in (a, b))
            first, second = (np.median(x, axis=1) for x in drawn)
            ratio, ends = float(np.median(b) / np.median(a)), np.quantile(second / first, CI95)
            ci95 = tuple(map(float, ends)) if key in judged else ()
        p = adjusted.get((key, ratio >= 1), 1.0)
        word = ("slower" if ratio >= 1 else "faster") if p <= SIGNIFICANT else "same"
        found[key] = Verdict(ratio, ci95, p, word if key in judged else "few")
    return found


def launches(a: Results, b: Results) -> dict[str, Sides]:
    """By what was measured, in words: the estimates of the launches, where both sides have it."""
    first, second = ({x.first.case: x.benchmarks for x in side.cases()} for side in (a, b))
    rules = [partial(timing.estimate, platform=side.context.get("platform", "")) for side in (a, b)]
    found: dict[str, Sides] = {}
    for name in (name for name in first if name in second):
        both = first[name], second[name]
        # A turn of --run counts if neither side failed in it.
        even = set.intersection(*({x.details.get("turn") for x in side} for side in both))
        kept = [[x.samples_s for x in side if x.details.get("turn") in even] for side in both]
        if all(kept):
            n = min(len(x) for side in kept for x in side)
            a_s, b_s = ([rule(x[:n]) for x in side] for rule, side in zip(rules, kept, strict=True))
            found[name] = a_s, b_s
    return found


def differences(a: Results, b: Results) -> list[str]:
    """A line for everything that only one side has, or that differs in the environment."""
    lines = []
    for side, found, other in (("A", a, b), ("B", b, a)):
        own, theirs = ([case.first.case for case in x.cases()] for x in (found, other))
        lines += [f"only in {side}: {name}" for name in own if name not in theirs]
        excluded = found.context.get("excluded", {}).items()
        lines += [f"excluded from {side}: {what}: {why}" for what, why in excluded]
    x, y = (side.context | side.context.get("variables", {}) for side in (a, b))
    changed = [k for k in sorted({*x, *y} - {*IGNORED}) if x.get(k) != y.get(k)]
    return lines + [f"differs: {k}: {x.get(k)} in A, {y.get(k)} in B" for k in changed]


def interleaved(
    sides: Sequence[Callable[..., None]], count: int, context: Mapping[str, Any] = {}, **more: Any
) -> list[Results]:
    """What each side, called with a Recorder of these arguments, records in `count` turns."""
    recorders = [Recorder(None, context, **more) for _ in sides]
    for number in range(count):
        for side in range(len(sides))[:: -1 if number % 2 else 1]:
            say(f"launch {number + 1} of {count}: {'ABC'[side]}")
            own = Recorder(None, context, **more)
            sides[side](own)
            recorders[side].take_in(own.found, turn=number)
    return [recorder.found for recorder in recorders]


def run_command(command: str, recorder: Recorder) -> None:
    """Runs a command that measures, and takes in its file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        why = "exit status 0"
        try:
            launch.run(["bash", "-c", f"{command} --output={file}"])
        except launch.ProcessError as error:  # the file may say what was excluded
            why = str(error)
        if not file.is_file() or not file.stat().st_size:
            raise UsageError(f"{command!r} wrote no results ({why}); it must take --output")
        found = results.read(file)
    if len({b.case for b in found.benchmarks}) < len(found.benchmarks):  # they share a moment
        raise UsageError(f"{command!r} measures a case several times; add --launches=1 to it")
    recorder.take_in(found)


def measure(options: argparse.Namespace) -> None:
    """Compares and prints the table; raises a WorseError if something in B is slower."""
    if len(options.files) + len(options.run or ()) != (0 if options.self_test else 2):
        raise UsageError("name two files, or two commands after --run, or --self_test")
    if options.self_test:
        self_test(options)
        return
    if options.run:
        commands = [partial(run_command, command) for command in options.run]
        a, b = interleaved(commands, options.launches)
    else:
        a, b = (results.read(Path(file)) for file in options.files)
    pairs = [(k, a.context.get(k), b.context.get(k)) for k in results.SAME_DEVICE]
    changed = "; ".join(f"{k}: {x} in A, {y} in B" for k, x, y in pairs if x != y)
    if changed and not options.across_devices:
        raise UsageError(f"the files are of two devices ({changed}); add --across_devices")
    if not (sides := launches(a, b)):
        raise UsageError("the files have nothing in common; compare files of the same benchmark")
    verdicts = judge(sides, options.threshold, paired=bool(options.run))
    rows = [
        [name, f"{v.ratio:.3f}", " to ".join(f"{x:.3f}" for x in v.ci95), f"{v.p:.2g}", v.word]
        for name, v in verdicts.items()
    ]
    limit = f"more than {options.threshold:.0%}"
    title = f"B's time divided by A's; slower: by {limit}, 5 % over all (Holm)"
    print(results.table(title, ["", "ratio", "95 %", "p", ""], rows))
    print("\n".join(differences(a, b)))
    if not options.run:
        print("files: one may be of a slower hour; --run measures both in turn")
    if any(v.word == "few" for v in verdicts.values()):
        print(f"few: fewer than {FEWEST} launches; measure with --launches={LAUNCHES}")
    if slower := [name for name, v in verdicts.items() if v.word == "slower"]:
        count = f"{len(slower)} of {len(verdicts)}"
        raise WorseError(f"B is slower by {limit} in {count}: {'; '.join(slower)}")


def self_test(options: argparse.Namespace) -> None:
    """Compares a step with itself and with the same made slower, many times."""
    context = launch.where("auto")
    recorder = Recorder(options.output, context)
    options.mode, options.what, planted = ["many"], ["train"], options.slow_down
    [slow, *_] = step.jobs_of(options)
    plain = dataclasses.replace(slow, slow_down=0.0)
    sides = [partial(launch.measure_jobs, jobs=[job]) for job in (plain, plain, slow)]
    scratch = tempfile.TemporaryDirectory()
    slower = alarms = 0
    for number in range(options.rounds):
        say(f"comparison {number + 1} of {options.rounds}")
        variables = launch.shared_cache(scratch.name)  # compiling would take most of the time
        a, *others = interleaved(sides, options.launches, context, variables=variables)
        # A slow-down must be found among as many comparisons as a card makes.
        for is_planted, family, b in zip((False, True), (1, CARD_CASES), others, strict=True):
            pairs = launches(a, b)
            [verdict] = judge(pairs, options.threshold, paired=True, family=family).values()
            slower += is_planted and verdict.word == "slower"
            alarms += not is_planted and verdict.word in ("slower", "faster")
            a_s, b_s = ([x.samples_s for x in side.benchmarks] for side in (a, b))
            recorder.row("self_test", planted=is_planted, a_s=a_s, b_s=b_s, **verdict._asdict())
        recorder.write()
    print(f"slow-downs of {planted:.0%} found: {slower} of {options.rounds}")
    print(f"alarms without one: {alarms} of {options.rounds}")
    if slower < round(WANTED * options.rounds) or alarms > round(ALLOWED * options.rounds):
        raise WorseError("the verdicts are not reliable on this machine as it is")


if __name__ == "__main__":
    flags = "files run launches threshold across_devices output self_test model slow_down rounds"
    defaults = {"launches": LAUNCHES, "model": ["mlp"], "slow_down": 0.1}
    raise SystemExit(launch.main(__doc__, measure, flags, **defaults, rounds=20))
