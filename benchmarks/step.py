"""Times training steps and evaluation: time a step, images a second, memory. The modes:

    many    many steps in one call of the compiled program, as training runs
    one     one dispatch a step; no step is waited for within a sample
    host    as one, with each batch gathered by NumPy and copied to the device
    seeds   many steps of 16 networks in one program

--launches=9 measures each case in nine processes; only such files can be compared.
"""

import argparse
import dataclasses
import itertools

from benchmarks import launch, results, timing
from benchmarks.results import Case, Recorder, Results
from benchmarks.workers.job import EVALUATION, TRAIN, Job

# Calls nearly as long as in training: a short one mostly copies the states of all networks.
SEEDS = {"seeds": 16, "min_sample_s": 0.5, "budget_s": 10.0}
MEMORY = ("params", "optimizer", "temporaries", "program")


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """A job for each network, batch size, precision and mode."""
    made, images = [], launch.random_images(options)
    axes = options.model, options.batch_size, options.precision, options.mode
    for model, batch_size, precision, mode in itertools.product(*axes):
        # An evaluation has batches of its own size whatever the mode: once is enough.
        what = [w for w in options.what if w == "train" or mode == options.mode[0]]
        case = {"model": model, "batch_size": batch_size, "precision": precision, "what": what}
        case |= {"mode": launch.MODES[mode], "platform": options.platform, **images}
        case |= {"samples": options.repeats} | (SEEDS if mode == "seeds" else {})
        case |= {"trace": options.trace and mode == "many" and "train" in what}
        if what:
            made.append(Job(**case, slow_down=options.slow_down))
    return made


def measure(options: argparse.Namespace, recorder: Recorder, prefix: str = "") -> None:
    """Measures every case in as many processes as --launches says; the first takes the traces."""
    jobs = jobs_of(options)
    for number in range(options.launches):
        results.say(f"launch {number + 1} of {options.launches}")
        launch.measure_jobs(recorder, jobs, prefix=prefix, details={"launch": number})
        jobs = [dataclasses.replace(job, trace=False) for job in jobs]


def _times(case: Case) -> list[str]:
    b, n = case.first, len(case.launches_s)
    speeds = timing.modes(case.launches_s if n > 1 else b.samples_s)
    notes = [" or ".join(f"{1e3 * s:.4g}" for s in speeds)] * (len(speeds) > 1)
    worst = max(case.benchmarks, key=lambda b: timing.spread(b.samples_s))
    notes.append(timing.warning(worst.samples_s))
    notes += ["a step is several CUDA graphs"] * (b.details.get("one_graph") is False)
    networks = int(b.mode.split()[0]) if b.mode[:1].isdecimal() else 1
    images = b.batch_size if b.name == TRAIN else b.details["images"]
    batch = str(b.batch_size) if b.name == TRAIN else "-"  # an evaluation has its own
    names = [b.name, b.model, batch, b.precision, b.mode, f"{n} × {len(b.samples_s)}"]
    interval = " to ".join(f"{1e3 * end:.4g}" for end in results.interval95(case.launches_s))
    times = [f"{1e3 * case.seconds:.4g}", interval, f"{networks * images / case.seconds:,.0f}"]
    return [*names, *times, "; ".join(filter(None, notes))]


def report(found: Results) -> list[str]:
    """The tables of times, memory and kernels."""
    cases, memory = found.cases(TRAIN, EVALUATION), []
    for b in (case.first for case in cases if "program_bytes" in case.first.details):
        sizes = (b.details.get(f"{name}_bytes") for name in MEMORY)
        megabytes = [f"{size / 1e6:.4g}" if size else "-" for size in sizes]
        memory.append([b.model, str(b.batch_size), b.mode, *megabytes])
    headings = ["", "model", "batch", "precision", "mode", "launches × samples", "ms"]
    headings += ["95 % of launches", "images/s", ""]
    return [
        results.table("Times", headings, [_times(case) for case in cases]),
        results.table("Memory of a training step, MB", ["model", "batch", "mode", *MEMORY], memory),
        *trace_tables(found),
    ]


def trace_tables(found: Results) -> list[str]:
    """What a step consists of, and its costliest operations."""
    rows, costliest = [], []
    for row in found.tables.get("trace", []):
        case = [row["model"], str(row["batch_size"]), row["precision"]]
        counts = [f"{row['kernels_per_step']:.4g}", str(row["issued_per_step"] or "-")]
        rows.append([*case, *counts, f"{row['gap_share']:.0%}"])
        for entry in row["costliest"]:
            numbers = [f"{entry['per_step']:.3g}", f"{entry['share']:.1%}"]
            costliest.append([*case, entry["operation"], entry["layer"] or "-", *numbers])
    headings = ["model", "batch", "precision"]
    counted = [*headings, "kernels a step", "issued by the host", "gaps while traced"]
    spent = [*headings, "operation", "layer", "times a step", "share"]
    title = "Kernels of a step (on a CPU: thunks)"
    return [results.table(title, counted, rows), results.table("Costliest", spent, costliest)]


if __name__ == "__main__":
    flags = f"{launch.CASES} mode what launches trace slow_down"
    raise SystemExit(launch.main(__doc__, measure, flags, report))
