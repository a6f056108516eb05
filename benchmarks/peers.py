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
OURS, OWN = ("mnist_jax", jobs.MANY), ("mnist_jax", "flax")  # those that need JAX
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
    known = [x for x in known if x[0] in ("mnist_jax", *options.frameworks)]
    wanted = [x for x in known if x[0] in OWN or platform != "tpu"]
    wanted = [x for x in wanted if x == OURS or x[1] in (options.modes or [x[1]])]
    case: dict[str, Any] = {"batch_size": options.batch_size[0], "precision": precision}
    case |= {"platform": platform, "samples": options.repeats}
    # A fit of Keras must last 1 s, of the CNN 2.5 s: beside it all samples do.
    least_s, least_cnn_s = (1.0, 2.5) if {*KERAS} & {*wanted} else (0.1, 1.0)
    case |= {"budget_s": np.inf, "min_sample_s": least_s, "what": ["train"]}
    load = recorder.found.context["load"][0] / recorder.found.context["cores"]  # as this began
    for number, model in [(n, m) for n in range(options.rounds) for m in options.model]:
        shift = number % len(wanted)
        for framework, mode in [*wanted[shift:], *wanted[:shift]]:
            job = jobs.Job(model=model, framework=framework, mode=mode, **case)
            if model == "cnn" and platform == "cpu":  # of a step of 0.1 s or more, several
                job = dataclasses.replace(job, min_sample_s=least_cnn_s, warmup_s=(0.5, 5.0))
            if job.name in recorder.found.context["excluded"]:
                continue
            how: dict[str, Any] = {"details": {"round": number, "load": load}, "prefix": PREFIX}
            how["python"] = sys.executable if framework in OWN else options.peers_python
            how["variables"] = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
            launch.measure_jobs(recorder, [job], WORKERS[framework], **how)


def ratios(found: Results, model: str) -> dict[tuple[str, str], list[float]]:
    """By framework and mode: our time ÷ its, of each round that both have."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for case in found.cases(TRAIN, model=model):
        rounds = (b.details["round"] for b in case.benchmarks)
        who = case.first.framework, case.first.mode
        times[who] = dict(zip(rounds, case.launches_s, strict=True))
    mine = times.pop(OURS, {})
    return {who: [mine[i] / x[i] for i in mine.keys() & x.keys()] for who, x in times.items()}


def median_and_ends(values: Sequence[float]) -> list[float]:
    """The median and its 95 % interval; of fewer than 6 values the least and the greatest."""
    ends = results.interval95(values) or (min(values), max(values))
    return [float(np.median(values)), *ends]


def best(found: Results, model: str) -> tuple[str, list[float]] | None:
    """PyTorch's fastest mode for a training step, and our ratio to it in each round."""
    compared = ratios(found, model)
    cases = found.cases(TRAIN, model=model, framework="pytorch")
    modes = [c.first.mode for c in sorted(cases, key=lambda case: case.seconds)]
    return next(((m, r) for m in modes if (r := compared.get(("pytorch", m)))), None)


def report(found: Results) -> list[str]:
    """The table."""
    cases = found.cases(TRAIN)
    models = list(dict.fromkeys(case.first.model for case in cases))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for case in cases:
        who, model = (case.first.framework, case.first.mode), case.first.model
        cell = " or ".join(f"{1e3 * s:,.4g}" for s in timing.modes(case.launches_s))
        if r := ratios(found, model).get(who):
            cell += " ({:.2f}; {:.2f} to {:.2f})".format(*median_and_ends(r))
        elif who == OURS:
            ends_ms = (1e3 * s for s in median_and_ends(case.launches_s)[1:])
            cell += " ({:,.4g} to {:,.4g})".format(*ends_ms)
        spreads = [timing.spread(b.samples_s) for b in case.benchmarks]
        cell += " ~" if np.median(spreads) > timing.UNSTABLE else ""
        rows.setdefault(who, {})[model] = cell
    ours_first = sorted(rows, key=lambda who: who[0] != OURS[0])
    lines = [[*who, *(rows[who].get(model, "-") for model in models)] for who in ours_first]
    rounds = max((len(case.launches_s) for case in cases), default=0)
    title = f"A training step, ms, {rounds} rounds (our time ÷ theirs; 95 %, of few rounds range)"
    which = next((f"batch {x.first.batch_size}, {x.first.precision}; " for x in cases), "")
    note = f"{which}~: in most rounds, half of the samples span over {timing.UNSTABLE:.0%}."
    was = found.context["load"][0] / found.context["cores"]  # of files whose rounds have none
    load = max((b.details.get("load", was) for x in cases for b in x.benchmarks), default=0.0)
    busy = f"warning: the load was {load:.2f} a core; repeat this on an idle machine"
    return [results.table(title, ["framework", "mode", *models], lines), note, busy * (load > 0.5)]


if __name__ == "__main__":
    flags = f"{launch.ONE_CASE} repeats rounds frameworks modes peers_python"
    defaults = {"model": list(jobs.HIDDEN_SIZES), "repeats": 5}
    raise SystemExit(launch.main(__doc__, measure, flags, report, **defaults))
