"""Whether a second result file is slower than a first; exits with 7 if it is.

    python -m benchmarks.compare A.json B.json
    python -m benchmarks.compare --run 'python -m benchmarks.step --model mlp' 'COMMAND B'

Benchmarks of the same name, network, batch size, precision and mode are set side by side: the ratio
of B's time to A's, by the medians over their launches, each of which counts by its least sample.
Times drift more between processes than within one, so launches are what is resampled and permuted,
never the samples in them; a file of fewer than `MIN_LAUNCHES` is shown without a verdict. B is
slower where the ratio exceeds 1 + threshold and no chance order of the launches explains it (the
exact test of Wilcoxon, 1945, and Mann and Whitney, 1947, at 5 %: it asks for the launches' ranks,
so that one which something else disturbed counts as one, however far out it lies).

--run makes both files: it starts each command `--launches` times in turn, A B B A A B …, in a
shell, with --output=FILE added, and keeps the files in --folder.
"""

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich import box
from rich.table import Table

from benchmarks import launch, results
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.errors import UsageError, WorseError

MIN_LAUNCHES = 5  # of either side, below which nothing is judged
LAUNCHES = 7  # so many, that one of either side may be disturbed, and many things be compared
SIGNIFICANT = 0.05
RESAMPLES = 10_000
MUST_AGREE = ("model", "batch_size", "precision")
IGNORED = ("command", "date", "left_out")  # of the context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags."""

    files: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[A B]", help_behavior_hint="(or --run)"),
    ] = ()
    """Two result files, A and B."""
    run: tuple[str, ...] | None = None
    """Two commands that measure, each in quotes, in place of the files."""
    launches: int = LAUNCHES
    """How often --run starts each command."""
    folder: Path | None = None
    """Folder where --run leaves A.json and B.json. None: nowhere."""
    threshold: float = 0.05
    """Share by which B may be slower."""

    def __post_init__(self):
        launch.check_options(self)
        if (len(self.files), commands := len(self.run or ())) not in ((2, 0), (0, 2)):
            raise UsageError(
                f"{len(self.files)} files and {commands} commands are named; "
                "name two files, or two commands after --run"
            )
        if not 0 <= self.threshold < math.inf:
            raise UsageError(
                f"threshold is {self.threshold}; allowed is any number from 0; change --threshold"
            )


class Verdict(NamedTuple):
    """What two sets of launches say of B against A.

    Attributes:
        ratio: of B's median to A's.
        ci95: the 95 % interval of the ratio over resampled launches.
        p: how often a chance order of the launches would set them as far apart.
        word: slower, faster, same, or few where there are too few launches to tell, whatever they
            took.
    """

    ratio: float
    ci95: tuple[float, float]
    p: float
    word: str


def decide(
    a: Sequence[float], b: Sequence[float], threshold: float, significant: float = SIGNIFICANT
) -> Verdict:
    """Compares the times of the launches of A and of B, in seconds."""
    logs = np.log(a), np.log(b)
    ratio = float(np.exp(np.median(logs[1]) - np.median(logs[0])))
    rng = np.random.default_rng(0)
    drawn = [np.median(rng.choice(log, (RESAMPLES, len(log))), axis=1) for log in logs]
    low, high = np.exp(np.quantile(drawn[1] - drawn[0], (0.025, 0.975)))
    p, word = rank_p(a, b), "same"
    rarest = 2 / math.comb(len(a) + len(b), len(a))  # all of one side below all of the other
    if min(len(a), len(b)) < MIN_LAUNCHES or rarest >= significant:
        word = "few"
    elif p < significant and ratio > 1 + threshold:
        word = "slower"
    elif p < significant and ratio < 1 / (1 + threshold):
        word = "faster"
    return Verdict(ratio, (float(low), float(high)), p, word)


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """How often a chance order would set the ranks of two sides as far apart, either way."""
    from scipy.stats import mannwhitneyu

    tied = len({*a, *b}) < len(a) + len(b)
    return float(mannwhitneyu(a, b, method="auto" if tied else "exact").pvalue)


def of_launch(samples_s: Sequence[float]) -> float:
    """The time of one launch by its samples: the least.

    What else a machine does only adds to a time, so the least is nearest to the program's own and
    varies least from launch to launch (Chen and Revels, "Robust benchmarking in noisy
    environments", 2016). A sample is the mean of all steps that it has time for, so what slows some
    of many short ones is in it; what slows some steps as long as a sample is not.
    """
    return min(samples_s)


def check_alike(a: Results, b: Results) -> None:
    """Refuses files that do not tell of the same work.

    Raises:
        UsageError: names the field that differs.
    """
    for field in MUST_AGREE:
        found = [sorted({getattr(x, field) for x in side.benchmarks}) for side in (a, b)]
        if found[0] != found[1]:
            raise UsageError(
                f"{field} differs: {found[0]} in A, {found[1]} in B; compare files of the same"
            )


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs in the environment, a line a field."""
    return [
        f"differs: {name}: {a.get(name)} in A, {b.get(name)} in B"
        for name in sorted(a.keys() | b.keys())
        if name not in IGNORED and a.get(name) != b.get(name)
    ]


def compare(a: Results, b: Results, threshold: float) -> dict[tuple[Any, ...], Verdict]:
    """The verdict on everything that both files measured."""
    first, second = _launches(a), _launches(b)
    both = {key: (first[key], second[key]) for key in first if key in second}
    # Of many comparisons one is extreme by chance: each is held to its share (Bonferroni).
    judged = sum(min(map(len, sides)) >= MIN_LAUNCHES for sides in both.values())
    significant = SIGNIFICANT / max(1, judged)
    return {key: decide(*sides, threshold, significant) for key, sides in both.items()}


def only_one_has(a: Results, b: Results) -> list[str]:
    """A line for everything that just one of the files measured."""
    first, second = _launches(a), _launches(b)
    return [
        *(f"only in A: {named(key)}" for key in first if key not in second),
        *(f"only in B: {named(key)}" for key in second if key not in first),
    ]


def _launches(found: Results) -> dict[tuple[Any, ...], list[float]]:
    """The time of each process that measured the same, by what it measured."""
    times: dict[tuple[Any, ...], list[float]] = {}
    for benchmark in found.benchmarks:
        times.setdefault(_key(benchmark), []).append(of_launch(benchmark.samples_s))
    return times


def _key(benchmark: Benchmark) -> tuple[Any, ...]:
    found = benchmark.details
    return *results.key(benchmark), *(found.get(name, "") for name in ("layer", "platform", "part"))


def interleaved(commands: Sequence[str], count: int) -> tuple[Results, Results]:
    """Both commands' results, from `count` processes each, in turn.

    Raises:
        UsageError: a command failed, or wrote no result file.
    """
    sides: tuple[list[Results], list[Results]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        for number in range(count):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                launch.say(f"launch {number + 1} of {count}: {'AB'[side]}")
                command = f"{commands[side]} --output={file}"
                done = subprocess.run(command, shell=True, capture_output=True, text=True)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                    raise UsageError(
                        f"{commands[side]!r} ended with status {done.returncode} ({last}); "
                        "name a command that measures and takes --output"
                    )
                sides[side].append(results.read(file))
                file.unlink()
    a, b = (_merged(side) for side in sides)
    return a, b


def _merged(found: Sequence[Results]) -> Results:
    """The benchmarks of several launches as those of one file."""
    merged = Recorder(None, found[0].context | {"left_out": {}})
    for number, one in enumerate(found):
        merged.take_in(one, f"launch {number + 1}: ", launch=number)
    return merged.found


def measure(options: Options) -> None:
    """Compares, prints the table, and raises where B is slower.

    Raises:
        WorseError: something in B is slower than in A.
    """
    if options.run:
        if options.folder is not None:
            results.check_writable(options.folder / "A.json")
        a, b = interleaved(options.run, options.launches)
        if options.folder is not None:
            for name, side in (("A", a), ("B", b)):
                results.write(options.folder / f"{name}.json", side.context, side.benchmarks)
    else:
        a, b = (results.read(Path(file)) for file in options.files)
    check_alike(a, b)
    verdicts = compare(a, b, options.threshold)
    if not verdicts:
        raise UsageError("the files have nothing in common; compare files of the same benchmark")
    show(verdicts)
    left_out = [
        f"left out of {name}: {what}: {why}"
        for name, side in (("A", a), ("B", b))
        for what, why in side.context.get("left_out", {}).items()
    ]
    for line in [*left_out, *only_one_has(a, b), *different(a.context, b.context)]:
        print(line)
    if few := sum(verdict.word == "few" for verdict in verdicts.values()):
        print(
            f"few: in {few} of {len(verdicts)} comparisons too few launches a side for a verdict, "
            "as times differ from process to process; measure with "
            f"--launches={LAUNCHES}, or use --run"
        )
    slower = [key for key, verdict in verdicts.items() if verdict.word == "slower"]
    if slower:
        raise WorseError(
            f"B is slower by more than {options.threshold:.0%} in {len(slower)} of "
            f"{len(verdicts)}: {'; '.join(map(named, slower))}"
        )


def named(key: tuple[Any, ...]) -> str:
    """What was measured, in words."""
    name, framework, model, batch_size, precision, mode, layer, platform, part = key
    words = [layer or name, model, f"batch {batch_size}", precision, mode, platform, part]
    words += [framework] * (framework != "mnist_jax")
    return ", ".join(word for word in words if word)


def show(verdicts: dict[tuple[Any, ...], Verdict]) -> None:
    """Prints the table."""
    table = Table(title="B's time divided by A's, by each launch's least sample", box=box.SIMPLE)
    table.add_column("")
    for heading in ("ratio", "95 %", "p", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for key, verdict in verdicts.items():
        low, high = verdict.ci95
        numbers = f"{verdict.ratio:.3f}", f"{low:.3f} to {high:.3f}", f"{verdict.p:.2g}"
        table.add_row(named(key), *numbers, verdict.word)
    launch.show([table])


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.compare", __doc__ or ""))
