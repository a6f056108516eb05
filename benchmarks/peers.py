"""Times training and evaluation here and in plain Flax, PyTorch and Keras, interleaved.

    python -m benchmarks.peers --output FILE

The same network, batches, precision and optimizer; what is inside the clock is described in
benchmarks/workers/job.py. In each round every framework runs once, in a process of its own with all
cores and the same malloc settings, in an order that rotates; ratios are taken within a round, so a
machine that slows down between rounds slows both sides. Every process takes as many samples. A
framework that is not installed, or fails, is excluded. On a GPU Keras is not measured.
"""

import argparse
import dataclasses
import sys
from typing import NamedTuple

from benchmarks import launch, results, step, timing
from benchmarks.results import Case, Recorder, Results
from benchmarks.workers.job import Job
from mnist_jax.errors import UsageError

NAMES = TRAIN, EVALUATION = "peers_train_step", "peers_evaluation"
COMPARABLE = ("logistic", "mlp", "cnn")  # networks that every worker knows
BUSY = 0.5  # a load per core above this, when starting, brings a warning


class Contender(NamedTuple):
    """A framework in one of its modes; `worker` is the module that knows both."""

    framework: str
    mode: str
    worker: str
    what: tuple[str, ...] = ("train", "eval")


OURS = Contender("mnist_jax", "many steps a call", "ours")
ALONE = Contender("mnist_jax", "one dispatch a step", "ours", ("train",))
FLAX = Contender("flax", "one dispatch a step", "plain_flax")
PYTORCH = [Contender("pytorch", mode, "pytorch") for mode in ("eager", "torch.compile")]
KERAS = [
    Contender("keras", mode, "tf_keras")
    for jit in ("fit", "fit, jit_compile")
    for mode in (jit, f"{jit}, epoch an execution")
]
GRAPHS = [
    Contender("pytorch", mode, "pytorch", ("train",))
    for mode in ("CUDA graph of the step", "torch.compile, CUDA graph of the step")
]


def measure(options: argparse.Namespace) -> None:
    """Runs all rounds, prints the tables and writes the file, after every process."""
    context = launch.where(options.platform)
    on_cpu = context["platform"] == "cpu"
    if on_cpu and options.precision != ["float32"]:
        raise UsageError(f"precision is {options.precision}; allowed on a CPU is float32")
    recorder = Recorder(options.output, context | {"malloc": launch.MALLOC})
    peers = [ALONE, FLAX, *PYTORCH, *(KERAS if on_cpu else GRAPHS)]
    wanted = [c for c in peers if c.framework in ("mnist_jax", *options.frameworks)]
    contenders = [OURS, *(c for c in wanted if c.mode in (options.modes or [c.mode]))]
    for number in range(options.rounds):
        for model in options.model:
            shift = number % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                what = tuple(w for w in contender.what if w in options.what)
                who = f"{contender.framework}, {contender.mode}, {model}"
                if not what or who in recorder.found.context["excluded"]:
                    continue
                job = Job(
                    model=model,
                    mode=contender.mode,
                    what=what,
                    batch_size=options.batch_size[0],
                    precision=options.precision[0],
                    platform=context["platform"],
                    samples=options.repeats,
                    min_samples=options.repeats,
                )
                if model == "cnn" and on_cpu:  # a step lasts longer than 0.1 s
                    job = dataclasses.replace(job, min_sample_s=0.5, warmup_s=(0.5, 5.0))
                with step.excluding(recorder, who):
                    run(contender, job, number, options, recorder)
                recorder.write()
    recorder.finish(report)


def run(
    contender: Contender, job: Job, number: int, options: argparse.Namespace, recorder: Recorder
) -> None:
    """Records the benchmarks of one process, and in the context what it says of its framework."""
    own = contender.worker in ("ours", "plain_flax")
    python = sys.executable if own else options.peers_python
    variables = launch.MALLOC | ({"JAX_PLATFORMS": "cpu"} if job.platform == "cpu" else {})
    module = f"benchmarks.workers.{contender.worker}"
    answer = launch.ask(module, dataclasses.asdict(job), variables, python)
    recorder.found.context.update(answer["context"])
    for b in step.benchmarks_of(job, answer, NAMES):
        details = b.details | {"round": number}
        recorder.add(dataclasses.replace(b, framework=contender.framework, details=details))


def ratios(found: Results, name: str, model: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """For each framework and mode: our time divided by its, the median, least and greatest.

    Of the rounds that both have.
    """
    times: dict[tuple[str, str], dict[int, float]] = {}
    for b in found.benchmarks:
        if (b.name, b.model) == (name, model):
            seconds = timing.estimate(b.samples_s, found.platform)
            times.setdefault((b.framework, b.mode), {})[b.details["round"]] = seconds
    mine = times.pop(OURS[:2], {})
    shared = {who: sorted(mine.keys() & theirs.keys()) for who, theirs in times.items()}
    return {
        who: timing.paired_ratio([mine[i] for i in rounds], [times[who][i] for i in rounds])
        for who, rounds in shared.items()
        if rounds
    }


def best(found: Results, model: str, framework: str) -> tuple[str, tuple[float, ...]] | None:
    """The fastest mode of a framework for a training step, and our ratio to it."""
    cases = found.cases(TRAIN, model=model, framework=framework)
    compared = ratios(found, TRAIN, model)
    timed = [case for case in cases if (framework, case.first.mode) in compared]
    if not timed:
        return None
    mode = min(timed, key=lambda case: case.seconds).first.mode
    return mode, compared[framework, mode]


def cell(case: Case, ratio: tuple[float, ...] | None) -> str:
    """Milliseconds, both if a framework has two speeds, and the ratio with its range."""
    speeds = " or ".join(f"{1e3 * s:,.4g}" for s in timing.modes(case.launches_s))
    return speeds + (" ({:.2f}; {:.2f} to {:.2f})".format(*ratio) if ratio else "")


def report(found: Results) -> list[str]:
    """A table for training and one for evaluation, and a warning if the machine was not idle."""
    parts = []
    for name in NAMES:
        cases = found.cases(name)
        models = list(dict.fromkeys(case.first.model for case in cases))
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for case in cases:
            who = case.first.framework, case.first.mode
            ratio = ratios(found, name, case.first.model).get(who)
            rows.setdefault(who, {})[case.first.model] = cell(case, ratio)
        lines = [[*who, *(of.get(model, "-") for model in models)] for who, of in rows.items()]
        lines.sort(key=lambda line: line[0] != OURS.framework)
        rounds = max((len(case.launches_s) for case in cases), default=0)
        title = f"{name.removeprefix('peers_')}, ms, {rounds} rounds (our time ÷ theirs; range)"
        parts.append(results.table(title, ["framework", "mode", *models], lines))
    load = found.context["load"][0] / found.context["cores"]
    if load > BUSY:
        parts.append(
            f"warning: the load was {load:.2f} a core when this began; other work slows some "
            "frameworks more than others; repeat this on an idle machine"
        )
    return parts


if __name__ == "__main__":
    flags = f"{launch.CASES} what rounds frameworks modes peers_python"
    sys.exit(launch.main(__doc__, measure, flags, model=list(COMPARABLE), repeats=5))
