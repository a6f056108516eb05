"""Says whether B is slower than A; exits with 7 if it is.

    python -m benchmarks.compare A.json B.json
    python -m benchmarks.compare --run 'python -m benchmarks.step --model mlp' 'COMMAND B'
    python -m benchmarks.compare --self_test

A and B are result files or folders of cards. What only one of them measured is listed, the rest
compared: the ratio of B's time to A's, by the medians over their launches (processes). A launch
counts by its estimate (`timing.estimate`), over equally many samples on both sides.

B is slower if its launches, divided by 1 + threshold, still rank above A's: an exact one-sided
test, at 5 % over all comparisons together (Holm, 1979). --run starts both commands in turn, A B B A
A B …, each with --output=FILE added; launches of a round are then compared as pairs (Wilcoxon's
signed ranks), since a machine that slows down slows both. Separate files are compared by the
rank-sum test of Mann and Whitney, and the difference between their days is part of the result.

--self_test checks the verdicts: commands alike, and one made slower on purpose.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import launch, results, timing
from benchmarks.results import Benchmark, Recorder, Results, say
from mnist_jax.errors import UsageError, WorseError

LAUNCHES = 11  # of a pair of commands: one round of them may contradict the others
SIGNIFICANT = 0.05
CARD_CASES = 18  # as many comparisons as a full card makes
WANTED, ALLOWED = 0.95, 0.05  # shares of slow-downs found and of false alarms in --self_test
SAME_DEVICE = ("platform", "device", "cpu", "cpu_family_model", "instruction_set", "cores")
IGNORED = ("command", "date", "excluded", "left_out", "load", "gpu", "parts", "dataset")

Sides = tuple[Sequence[float], Sequence[float]]


class Verdict(NamedTuple):
    """What the launches of two sides say.

    Attributes:
        ratio: of B's median to A's.
        ci95: the bootstrap 95 % interval of the ratio over resampled launches.
        p: of ranks so extreme if B is not slower (for a ratio below 1, not faster) than the
            threshold, adjusted by Holm for all comparisons.
        word: slower, faster, same, or few if there are too few launches for any verdict.
    """

    ratio: float
    ci95: tuple[float, float]
    p: float
    word: str


def rank_p(a: Sequence[float], b: Sequence[float], *, paired: bool) -> float:
    """The probability of ranks so far apart if b is not greater than a; one-sided, exact."""
    from scipy.stats import mannwhitneyu, wilcoxon

    if not paired:
        method = "auto" if len({*a, *b}) < len(a) + len(b) else "exact"  # auto if there are ties
        return float(mannwhitneyu(b, a, alternative="greater", method=method).pvalue)
    differences = np.log(b) - np.log(a)
    found: Any = wilcoxon(differences, alternative="greater") if differences.any() else None
    return float(found.pvalue) if found else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values, each to be compared with the level for all of them together."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


def judge(
    sides: Mapping[Any, Sides], threshold: float, *, paired: bool, family: int = 0
) -> dict[Any, Verdict]:
    """The verdict on each of several comparisons.

    Args:
        sides: for each comparison, the times of the launches of A and of B.
        threshold: share by which B may be slower.
        paired: whether launch i of A ran beside launch i of B.
        family: judge as if there were this many comparisons, the others without difference.
    """
    family, grown = max(family, len(sides)), 1 + threshold
    others = [1.0] * (family - len(sides))
    slower, faster = (
        holm([rank_p(a, [x / grown for x in b], paired=paired) for a, b in pairs] + others)
        for pairs in (sides.values(), [(b, a) for a, b in sides.values()])
    )
    found, rng = {}, np.random.default_rng(0)
    for i, (key, (a, b)) in enumerate(sides.items()):
        drawn = rng.integers(len(a), size=(10_000, len(a)))
        other = drawn if paired else rng.integers(len(b), size=(10_000, len(b)))
        ratios = np.median(np.take(b, other), axis=1) / np.median(np.take(a, drawn), axis=1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        ratio = float(np.median(b) / np.median(a))
        least = 1 / (2 ** len(a) if paired else math.comb(len(a) + len(b), len(a)))
        p, word = (slower[i], "slower") if ratio >= 1 else (faster[i], "faster")
        word = "few" if least * family > SIGNIFICANT else word if p <= SIGNIFICANT else "same"
        found[key] = Verdict(ratio, (float(low), float(high)), p, word)
    return found


def by_key(benchmarks: Sequence[Benchmark]) -> dict[Any, list[Benchmark]]:
    """The launches of everything measured."""
    found: dict[Any, list[Benchmark]] = {}
    for b in benchmarks:
        found.setdefault(b.key, []).append(b)
    return found


def launches(a: Results, b: Results) -> dict[Any, Sides]:
    """The estimates of the launches of everything that both sides measured."""
    first, second = by_key(a.benchmarks), by_key(b.benchmarks)
    found = {}
    for key in (key for key in first if key in second):
        count = min(len(x.samples_s) for x in (*first[key], *second[key]))
        found[key] = tuple(
            [timing.estimate(x.samples_s[:count], a.platform) for x in side]
            for side in (first[key], second[key])
        )
    return found


def check_same_device(a: Results, b: Results) -> None:
    """Refuses to compare devices.

    Raises:
        UsageError: names the fields that differ.
    """
    changed = [
        f"{name}: {a.context[name]} in A, {b.context[name]} in B"
        for name in SAME_DEVICE
        if name in a.context and name in b.context and a.context[name] != b.context[name]
    ]
    if changed:
        raise UsageError(
            f"the files are of two devices ({'; '.join(changed)}); add --across_devices to compare"
        )


def differences(a: Results, b: Results) -> list[str]:
    """A line for everything that only one side has, or that differs in the environment."""
    keys = by_key(a.benchmarks), by_key(b.benchmarks)
    lines = []
    for i, name in enumerate("AB"):
        lines += [
            f"only in {name}: {x[0].case}" for k, x in keys[i].items() if k not in keys[1 - i]
        ]
        excluded = (a, b)[i].context.get("excluded", {}).items()
        lines += [f"excluded from {name}: {what}: {why}" for what, why in excluded]
    x, y = (
        found | {v: value for v, value in found.pop("variables", {}).items() if "CACHE" not in v}
        for found in ({k: v for k, v in s.context.items() if k not in IGNORED} for s in (a, b))
    )
    return lines + [
        f"differs: {name}: {x.get(name)} in A, {y.get(name)} in B"
        for name in sorted(x.keys() | y.keys())
        if x.get(name) != y.get(name)
    ]


def interleaved(commands: Sequence[str], count: int) -> list[Results]:
    """The results of each command, from `count` processes each, in turn and in turning order.

    Raises:
        UsageError: a command failed or wrote no result file.
    """
    recorders = [Recorder(None, {}) for _ in commands]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        for number in range(count):
            for side in range(len(commands))[:: -1 if number % 2 else 1]:
                say(f"launch {number + 1} of {count}: {'ABC'[side]}")
                try:
                    launch.run(["bash", "-c", f"{commands[side]} --output={file}"])
                    recorders[side].take_in(results.read(file), launch=number)
                except launch.ProcessError as error:
                    raise UsageError(
                        f"{commands[side]!r} failed ({error}); name a command that measures and "
                        "takes --output"
                    ) from error
                file.unlink()
    return [recorder.found for recorder in recorders]


def measure(options: argparse.Namespace) -> None:
    """Compares and prints the table.

    Raises:
        UsageError: the files cannot be compared.
        WorseError: something in B is slower than in A.
    """
    if options.self_test:
        self_test(options)
        return
    if (len(options.files), len(options.run or ())) not in ((2, 0), (0, 2)):
        raise UsageError("name two files, or two commands after --run")
    if options.run:
        a, b = interleaved(options.run, options.launches)
        for name, side in (("A", a), ("B", b)) if options.folder else ():
            results.check_writable(options.folder / f"{name}.json")
            results.write(options.folder / f"{name}.json", *side)
    else:
        a, b = (results.read(Path(file)) for file in options.files)
    if not options.across_devices:
        check_same_device(a, b)
    if not (sides := launches(a, b)):
        raise UsageError("the files have nothing in common; compare files of the same benchmark")
    verdicts = judge(sides, options.threshold, paired=bool(options.run))
    names = {x.key: x.case for x in a.benchmarks}
    rows = [
        [names[key], f"{v.ratio:.3f}", f"{v.ci95[0]:.3f} to {v.ci95[1]:.3f}", f"{v.p:.2g}", v.word]
        for key, v in verdicts.items()
    ]
    limit = f"more than {options.threshold:.0%}"
    title = f"B's time divided by A's; slower: by {limit}, 5 % over all (Holm)"
    print(results.table(title, ["", "ratio", "95 %", "p", ""], rows))
    print("\n".join(differences(a, b)))
    if few := sum(v.word == "few" for v in verdicts.values()):
        print(
            f"few: {few} of {len(verdicts)} comparisons have too few launches for a verdict; "
            f"measure with --launches={LAUNCHES}, or use --run"
        )
    if slower := [names[key] for key, v in verdicts.items() if v.word == "slower"]:
        count = f"{len(slower)} of {len(verdicts)}"
        raise WorseError(f"B is slower by {limit} in {count}: {'; '.join(slower)}")


def self_test(options: argparse.Namespace) -> None:
    """Compares a command with itself and with the same made slower, many times.

    Raises:
        WorseError: fewer slow-downs were found, or more alarms raised, than allowed.
    """
    earlier = results.read(options.again) if options.again else None
    recorder = Recorder(options.output, earlier.context if earlier else launch.where("auto"))
    rows = earlier.tables["self_test"] if earlier else []
    plain = f"{sys.executable} -m benchmarks.step --model {options.model[0]} --mode many"
    plain += f" --what train --repeats={options.repeats}"
    commands = (plain, plain, f"{plain} --slow_down={options.slow_down}")
    for number in range(0 if earlier else options.comparisons):
        say(f"comparison {number + 1} of {options.comparisons}")
        sides = interleaved(commands, options.launches)
        a_s, *others = ([b.samples_s for b in side.benchmarks] for side in sides)
        pairs = zip((False, True), others, strict=True)
        rows += [{"planted": planted, "a_s": a_s, "b_s": b_s} for planted, b_s in pairs]
        judge_rows(recorder, rows, options.threshold)
    found, alarms = judge_rows(recorder, rows, options.threshold)
    half = len(rows) // 2
    print(f"slow-downs of {options.slow_down:.0%} found: {found} of {half}")
    print(f"alarms without one: {alarms} of {half}")
    if found < round(WANTED * half) or alarms > round(ALLOWED * half):
        raise WorseError("the verdicts are not reliable on this machine as it is")


def judge_rows(
    recorder: Recorder, rows: Sequence[dict[str, Any]], threshold: float
) -> tuple[int, int]:
    """Judges the rows of a self-test and writes them; returns slow-downs found and false alarms.

    A slow-down must be found as one of as many comparisons as a card makes; an alarm without one
    counts as if it were the only comparison.
    """
    recorder.found.tables["self_test"] = []
    words: dict[bool, list[str]] = {True: [], False: []}
    for row in rows:
        a, b = (
            [timing.estimate(s, recorder.found.platform) for s in row[side]]
            for side in ("a_s", "b_s")
        )
        family = CARD_CASES if row["planted"] else 1
        verdict = judge({"": (a, b)}, threshold, paired=True, family=family)[""]
        recorder.row("self_test", **row | verdict._asdict())
        words[row["planted"]].append(verdict.word)
    recorder.write()
    return words[True].count("slower"), sum(word != "same" for word in words[False])


if __name__ == "__main__":
    flags = "files run launches folder threshold across_devices output"
    flags += " self_test model slow_down comparisons repeats again"
    defaults = {"launches": LAUNCHES, "model": ["mlp"], "slow_down": 0.1, "repeats": 10}
    sys.exit(launch.main(__doc__, measure, flags, **defaults))
