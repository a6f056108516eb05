"""Times a training step here and in plain Flax, PyTorch and Keras, interleaved.

The same network, batches, precision, optimizer and malloc settings. In each round every framework
runs once, in its own process, in an order that rotates; ratios are of a round. What fails is
excluded. On a GPU Keras is not measured, on a TPU neither Keras nor PyTorch.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import launch, results, timing
from benchmarks.results import Recorder, Results
from benchmarks.workers import job as jobs
from mnist_jax.errors import UsageError, unknown_choice

PREFIX = "peers_"
TRAIN = PREFIX + jobs.TRAIN
WORKERS = {"mnist_jax": "", "flax": "plain_flax", "pytorch": "pytorch", "keras": "tf_keras"}
OURS = "mnist_jax", jobs.MANY
MODES = [OURS, ("mnist_jax", jobs.ONE), ("flax", jobs.HOST)]
MODES += [("pytorch", mode) for mode in (jobs.EAGER, jobs.COMPILED)]
KERAS = [("keras", mode) for mode in (jobs.FIT, jobs.EPOCH, jobs.FIT_JIT, jobs.EPOCH_JIT)]
GRAPHS = [("pytorch", mode) for mode in (jobs.GRAPH, jobs.COMPILED_GRAPH)]


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Runs all rounds."""
    platform, precision = recorder.found.context["platform"], options.precision[0]
    if unknown := {*options.model} - jobs.HIDDEN_SIZES.keys():
        raise unknown_choice("model", min(unknown), jobs.HIDDEN_SIZES)
    if platform == "cpu" and precision != "float32":
        raise UsageError(f"precision is {precision}; allowed on a CPU is float32")
    known = [*MODES, *(KERAS if platform == "cpu" else GRAPHS)]
    frameworks = [x for x in options.frameworks if x == "flax" or platform != "tpu"]
    wanted = [x for x in known if x[0] in ("mnist_jax", *frameworks)]
    wanted = [x for x in wanted if x == OURS or x[1] in (options.modes or [x[1]])]
    case: dict[str, Any] = {"batch_size": options.batch_size[0], "precision": precision}
    case |= {"platform": platform, "samples": options.repeats}
    # A fit of Keras must last 1 s, of the CNN 2.5 s: beside it all samples do.
    least_s, least_cnn_s = (1.0, 2.5) if {*KERAS} & {*wanted} else (0.1, 1.0)
    case |= {"budget_s": np.inf, "min_sample_s": least_s, "what": ["train"]}
    for number, model in [(n, m) for n in range(options.rounds) for m in options.model]:
        shift = number % len(wanted)
        for framework, mode in [*wanted[shift:], *wanted[:shift]]:
            job = jobs.Job(model=model, framework=framework, mode=mode, **case)
            if model == "cnn" and platform == "cpu":  # of a step of 0.1 s or more, several
                job = dataclasses.replace(job, min_sample_s=least_cnn_s, warmup_s=(0.5, 5.0))
            if job.name in recorder.found.context["excluded"]:
                continue
            own = framework in ("mnist_jax", "flax")
            how: dict[str, Any] = {"python": sys.executable if own else options.peers_python}
            how["variables"] = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
            how |= {"prefix": PREFIX, "details": {"round": number}}
            launch.measure_jobs(recorder, [job], WORKERS[framework], **how)


def ratios(found: Results, model: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """By framework and mode: our time ÷ its in rounds that both have; median and `ends_of`."""
    times, compared = {}, {}
    for case in found.cases(TRAIN, model=model):
        rounds = (b.details["round"] for b in case.benchmarks)
        who = case.first.framework, case.first.mode
        times[who] = dict(zip(rounds, case.launches_s, strict=True))
    mine = times.pop(OURS, {})
    for who, theirs in times.items():
        if r := [mine[i] / theirs[i] for i in mine.keys() & theirs.keys()]:
            compared[who] = float(np.median(r)), *ends_of(r)
    return compared


def ends_of(values: Sequence[float]) -> Sequence[float]:
    """The 95 % interval of the median; of fewer than 6 values the least and the greatest."""
    return results.interval95(values) or (min(values), max(values))


def best(found: Results, model: str, framework: str) -> tuple[str, int, tuple[float, ...]] | None:
    """A framework's fastest mode for a training step, its rounds, and our ratio to it."""
    cases, compared = found.cases(TRAIN, model=model, framework=framework), ratios(found, model)
    timed = [case for case in cases if (framework, case.first.mode) in compared]
    if not timed:
        return None
    fastest = min(timed, key=lambda case: case.seconds)
    return fastest.first.mode, len(fastest.launches_s), compared[framework, fastest.first.mode]


def report(found: Results) -> list[str]:
    """The table."""
    cases = found.cases(TRAIN)
    models = list(dict.fromkeys(case.first.model for case in cases))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for case in cases:
        who, model = (case.first.framework, case.first.mode), case.first.model
        cell = " or ".join(f"{1e3 * s:,.4g}" for s in timing.modes(case.launches_s))
        if ratio := ratios(found, model).get(who):
            cell += " ({:.2f}; {:.2f} to {:.2f})".format(*ratio)
        elif who == OURS:
            cell += " ({:,.4g} to {:,.4g})".format(*(1e3 * s for s in ends_of(case.launches_s)))
        spreads = [timing.spread(b.samples_s) for b in case.benchmarks]
        cell += " ~" if np.median(spreads) > timing.UNSTABLE else ""
        rows.setdefault(who, {})[model] = cell
    lines = [[*who, *(of.get(model, "-") for model in models)] for who, of in rows.items()]
    lines.sort(key=lambda line: line[0] != OURS[0])
    rounds = max((len(case.launches_s) for case in cases), default=0)
    title = f"A training step, ms, {rounds} rounds (our time ÷ theirs; 95 %, of few rounds range)"
    which = next((f"batch {x.first.batch_size}, {x.first.precision}; " for x in cases), "")
    note = f"{which}~: in most rounds, half of the samples span over {timing.UNSTABLE:.0%}."
    load = found.context["load"][0] / found.context["cores"]  # when this began
    busy = f"warning: the load was {load:.2f} a core; repeat this on an idle machine"
    return [results.table(title, ["framework", "mode", *models], lines), note, busy * (load > 0.5)]


if __name__ == "__main__":
    flags = f"{launch.ONE_CASE} rounds frameworks modes peers_python"
    defaults = {"model": list(jobs.HIDDEN_SIZES), "repeats": 5}
    raise SystemExit(launch.main(__doc__, measure, flags, report, **defaults))
