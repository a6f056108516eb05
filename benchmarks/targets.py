"""What one GPU is asked to reach, and the page that holds what `benchmarks.gpu` found against it.

A value that was not measured is said to be so, and counts for nothing.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks import peers, step
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from benchmarks.results import Benchmark, Results

Measured = tuple[float, str] | None
"""A value, and what it is of; None where it was not measured."""


class Target(NamedTuple):
    """One of them.

    Attributes:
        what: is measured.
        sign: which side of the limit is asked for.
        limit: in `unit`.
        unit: of the limit and of what `find` returns.
        find: looks it up in the findings.
    """

    what: str
    sign: Literal["≤", "≥"]
    limit: float
    unit: str
    find: Callable[[Results], Measured]

    def met_by(self, value: float) -> bool:
        """Whether that is on the side that is asked for."""
        return {"≤": operator.le, "≥": operator.ge}[self.sign](value, self.limit)


def _steps(found: Results, part: str, model: str, precision: str) -> list[Benchmark]:
    wanted = (step.TRAIN, part, model, precision)
    return [
        b for b in found.benchmarks if (b.name, b.details["part"], b.model, b.precision) == wanted
    ]


def _runs(found: Results, part: str, command: str) -> list[dict[str, Any]]:
    rows = found.tables.get("runs", [])
    return [row for row in rows if row["part"] == part and row["command"].startswith(command)]


def epoch_ms(precision: str, mode: str = ours.MANY) -> Callable[[Results], Measured]:
    """The time of an epoch's 600 steps of the CNN at batch 100, evaluation not included."""

    def find(found: Results) -> Measured:
        for b in _steps(found, "epoch", "cnn", precision):
            if (b.batch_size, b.mode) == (100, mode):
                steps = jobs.Job.train_size // b.batch_size
                return 1e3 * steps * b.median_s, f"{steps} steps of the median of {_n(b)}"
        return None

    return find


def _n(b: Benchmark) -> str:
    return f"{len(b.samples_s)} samples"


def matrix_share(found: Results) -> Measured:
    """The operations of a step at batch 4096 by definition, in percent of the measured rate."""
    for b in _steps(found, "epoch", "cnn", "bfloat16"):
        if b.batch_size == 4096 and "mfu" in b.details:
            return 100 * b.details["mfu"], f"the median of {_n(b)}"
    return None


def against(model: str, precision: str, mode: str) -> Callable[[Results], Measured]:
    """Our time over PyTorch's, in that of its modes of this kind in which it is fastest."""

    def find(found: Results) -> Measured:
        steps = _steps(found, "peers", model, precision)
        if not any((b.framework, b.mode) == peers.OURS[:2] for b in steps):
            return None
        rows = [row for row in peers.rows(steps) if row.framework == "pytorch"]
        rows = [row for row in rows if row.mode.startswith(mode)]
        if not rows:
            return None
        fastest = max(rows, key=lambda row: row.ratio)
        return fastest.ratio, f"{fastest.mode}, {1e3 * fastest.median_s:.3g} ms a step"

    return find


def reached_s(target: float) -> Callable[[Results], Measured]:
    """The mean over the seeds, without compiling and loading the data; inf unless all reach it."""

    def find(found: Results) -> Measured:
        rows = found.tables.get("time_to_accuracy", [])
        rows = [row for row in rows if (row["model"], row["target"]) == ("cnn", target)]
        if not rows:
            return None
        times = [row["reached_s"] - row["data_s"] for row in rows if row["reached_s"] is not None]
        mean = float(np.mean(times)) if len(times) == len(rows) else float("inf")
        return mean, f"{len(times)} of {len(rows)} seeds reach it, {rows[0]['precision']}"

    return find


def speedup(model: str) -> Callable[[Results], Measured]:
    """Seconds of training of as many runs, one after the other, over those of one for all."""

    def find(found: Results) -> Measured:
        rows = found.tables.get("time_to_accuracy", [])
        alone = {row["seed"]: row["train_s"] for row in rows if row["model"] == model}
        for row in _runs(found, "seeds", model):
            some = [alone[seed] for seed in sorted(alone)[: row["seeds"]]]
            if len(some) == row["seeds"]:
                seconds = row["timings"]["train_s"]
                return sum(some) / seconds, f"{sum(some):.3g} s against {seconds:.3g} s"
        return None

    return find


def mean_accuracy(preset: str) -> Callable[[Results], Measured]:
    """The mean over all seeds of a recipe's runs, in percent."""

    def find(found: Results) -> Measured:
        runs = _runs(found, "recipes", f"{preset}-")
        values = [100 * share for row in runs for share in row["test_accuracy"]]
        if len(values) < 2:
            return None
        return float(np.mean(values)), f"{len(values)} seeds, sd {np.std(values, ddof=1):.2f}"

    return find


def vote(found: Results) -> Measured:
    """The accuracy of the first ten networks' mean probabilities, in percent."""
    for row in found.tables.get("votes", []):
        if row["command"] == "ensemble-1234":
            ema_params, members = row["averaged"], row["members"]
            return 100 * ema_params[
                "accuracy"
            ], f"{ema_params['correct']} images, {members} members"
    return None


TARGETS = (
    Target("an epoch of the CNN, batch 100, bfloat16", "≤", 100, "ms", epoch_ms("bfloat16")),
    Target("an epoch of the CNN, batch 100, tf32", "≤", 250, "ms", epoch_ms("tf32")),
    Target("the CNN at batch 4096, of the measured matrix rate", "≥", 50, "%", matrix_share),
    Target("CNN, bfloat16 ÷ PyTorch eager", "≤", 0.5, "", against("cnn", "bfloat16", "eager")),
    Target("CNN, bfloat16 ÷ compiled", "≤", 0.8, "", against("cnn", "bfloat16", "torch.compile")),
    Target("CNN, tf32 ÷ PyTorch eager", "≤", 0.5, "", against("cnn", "tf32", "eager")),
    Target("CNN, tf32 ÷ compiled", "≤", 0.8, "", against("cnn", "tf32", "torch.compile")),
    Target("MLP ÷ PyTorch eager", "≤", 0.3, "", against("mlp", "float32", "eager")),
    Target("MLP ÷ compiled", "≤", 0.3, "", against("mlp", "float32", "torch.compile")),
    Target("logistic ÷ PyTorch eager", "≤", 0.3, "", against("logistic", "float32", "eager")),
    Target("logistic ÷ compiled", "≤", 0.3, "", against("logistic", "float32", "torch.compile")),
    Target("the CNN to 99.0 %", "≤", 0.4, "s", reached_s(0.99)),
    Target("the CNN to 99.5 %", "≤", 1, "s", reached_s(0.995)),
    Target("16 seeds of the CNN in one program, times as fast", "≥", 2, "", speedup("cnn")),
    Target("16 seeds of the MLP in one program, times as fast", "≥", 2, "", speedup("mlp")),
    Target("fast, mean", "≥", 99.5, "%", mean_accuracy("fast")),
    Target("best, mean", "≥", 99.7, "%", mean_accuracy("best")),
    Target("ten of best, mean probabilities", "≥", 99.8, "%", vote),
)


def summary(found: Results) -> str:
    """The page: the targets, the runs, and what was left out."""
    context = found.context
    dirty = " with changes" if context["git_dirty"] else ""
    lines = [
        f"# {context['device']}",
        "",
        f"jax {context['jax']}, {context['driver'] or context['cpu']}, data set "
        f"{context['dataset']}, commit {context['git_commit']}{dirty}.",
    ]
    if context["short"]:
        lines += ["", "Only tried, in its short form: these numbers measure nothing."]
    lines += ["", *_table(("target", "asked", "measured", "of", "met"), map(_row(found), TARGETS))]
    for mode in (ours.MANY, ours.ONE):
        for precision in ("bfloat16", "tf32"):
            if measured := epoch_ms(precision, mode)(found):
                lines += ["", f"{mode}, {precision}: {measured[0]:.4g} ms an epoch"]
    return "\n".join([*lines, "", *_of_runs(found), *_endings(context)]) + "\n"


def _row(found: Results) -> Callable[[Target], Sequence[str]]:
    def cells(target: Target) -> Sequence[str]:
        asked = f"{target.sign} {target.limit:g} {target.unit}".rstrip()
        measured = None if found.context["short"] else target.find(found)
        if measured is None:
            return target.what, asked, "not measured", "", ""
        value, of = measured
        met = "yes" if target.met_by(value) else "no"
        return target.what, asked, f"{value:.4g} {target.unit}".rstrip(), of, met

    return cells


def _of_runs(found: Results) -> list[str]:
    """The runs, and whether those that must be alike are."""
    runs = found.tables.get("runs", [])
    rows = []
    for row in runs:
        shares, digests = row["test_accuracy"], row["params_sha256"]
        several = isinstance(shares, list)
        accuracy = f"{100 * float(np.mean(shares)):.2f}"
        if several:
            accuracy += f" ({len(shares)} seeds)"
        digest = "" if several else digests[:12]
        train_s, compile_s = (f"{row['timings'][name]:.3g}" for name in ("train_s", "compile_s"))
        name = f"{row['part']}/{row['command']}"
        rows.append((name, accuracy, train_s, compile_s, digest))
    headings = ("run", "test accuracy, %", "training, s", "compiling, s", "SHA-256 of parameters")
    lines = _table(headings, rows) if rows else []
    repeated = {row["command"]: row for row in runs if row["part"] == "deterministic"}
    off = repeated.pop("off", None)
    if len(repeated) > 1:
        count = len({row["params_sha256"] for row in repeated.values()})
        kills = sum(row.get("kills", 0) for row in repeated.values())
        same = "the same parameters" if count == 1 else f"{count} different sets of parameters"
        lines += ["", f"{len(repeated)} deterministic runs, killed {kills} times in all: {same}."]
    if off and "once" in repeated:
        times = repeated["once"]["timings"]["train_s"] / off["timings"]["train_s"]
        lines += ["", f"--deterministic: training takes {times:.3g} times as long as without."]
    return lines


def _endings(context: dict[str, Any]) -> list[str]:
    """How long the parts took, and what is missing."""
    seconds = ", ".join(f"{part} {s:.0f} s" for part, s in context["seconds"].items())
    lines = ["", f"Time taken: {seconds or 'none'}."]
    if lost := context["left_out"]:
        lines += ["", "## Left out", "", *(f"- {what}: {why}" for what, why in lost.items())]
    return lines


def _table(headings: Sequence[str], rows: Any) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
