"""Times training steps and evaluation: latency, images a second, memory.

    python -m benchmarks.step --model mlp --batch_size 100 4096 --output FILE

for each network, batch size, precision and mode, on random images:

    many    many steps in one call of the compiled program, as training runs
    one     one dispatch a step; no step is waited for within a sample
    host    as one, with each batch gathered by NumPy and copied to the device
    seeds   many steps of --seeds networks in one program

What is inside the clock is described in benchmarks/workers/job.py. --launches=9 measures each case
in nine processes: times differ more between processes than within one, and only such files can be
compared by `python -m benchmarks.compare`. --trace counts the kernels of a step.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import launch, results, timing
from benchmarks.results import Benchmark, Recorder, Results
from benchmarks.workers import job as jobs
from benchmarks.workers import ours
from mnist_jax import errors
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.parallel import mesh

TRAIN, EVALUATION = "train_step", "evaluation"
MODES = {"many": ours.MANY, "one": ours.ONE, "host": ours.HOST, "seeds": ours.MANY}
MEMORY = ("params", "optimizer", "temporaries", "program", "peak")
FLAGS = f"{launch.CASES} mode what seeds launches trace trace_dir slow_down"


def jobs_of(options: argparse.Namespace) -> list[jobs.Job]:
    """A job for each network, batch size, precision and mode."""
    made = []
    for model, batch_size, precision, mode in itertools.product(
        options.model, options.batch_size, options.precision, options.mode
    ):
        # An evaluation has batches of its own size whatever the mode: once is enough.
        what = tuple(w for w in options.what if w == "train" or mode == options.mode[0])
        case = {"model": model, "batch_size": batch_size, "precision": precision, "what": what}
        case |= {"mode": MODES[mode], "seeds": options.seeds if mode == "seeds" else None}
        case |= {"platform": options.platform, "samples": options.repeats}
        if what:
            made.append(jobs.Job(**case, slow_down=options.slow_down))
    return made


def named(job: jobs.Job, name: str = TRAIN) -> dict[str, Any]:
    """The fields by which a benchmark of a job is found again."""
    mode = f"{job.seeds} seeds, {job.mode}" if job.seeds else job.mode
    case = {"batch_size": job.batch_size, "precision": job.precision, "mode": mode}
    return {"name": name, "model": job.model, **case}


def benchmarks_of(
    job: jobs.Job, answer: dict[str, Any], names: Sequence[str] = (TRAIN, EVALUATION)
) -> list[Benchmark]:
    """The benchmarks in the answer of a worker, by these names."""
    made = []
    for what, name in zip(("train", "eval"), names, strict=True):
        if times := answer.get(what):
            samples = {key: times[key] for key in ("samples_s", "warmup_s")}
            details = times["details"] | {"steps_per_sample": times["steps_per_sample"]}
            made.append(Benchmark(**named(job, name), **samples, details=details))
    return made


@contextlib.contextmanager
def excluding(recorder: Recorder, what: str) -> Iterator[None]:
    """Notes what fails inside for lack of memory or support, and continues after it."""
    try:
        yield
    except (DeviceError, UsageError, launch.ProcessError) as error:
        recorder.exclude(what, str(error))
    except MemoryError:
        recorder.exclude(what, "out of memory")
    except jax.errors.JaxRuntimeError as error:
        memory = "out of memory: " if errors.is_out_of_memory(error) else ""
        recorder.exclude(what, f"{memory}{errors.first_line(error)}")


def time_job(
    job: jobs.Job,
    *,
    alone: bool = False,
    name: str = TRAIN,
    devices: Sequence[jax.Device] | None = None,
) -> list[Benchmark]:
    """The benchmarks of one job in this process.

    Args:
        job: what to measure.
        alone: this process has measured nothing else, so that its peak of memory is the job's.
        name: of the training step's benchmark.
        devices: what a batch is divided among; None for one.
    """
    with jax.default_matmul_precision(mesh.MATMUL_PRECISION[job.precision]):
        answer = jobs.run(job, partial(ours.make, devices=devices))
    if "train" in answer:
        device, details = mesh.select_device(job.platform), answer["train"]["details"]
        resident = details.pop("peak_rss_bytes")
        stats = device.memory_stats() if device.platform != "cpu" else None
        peak = (stats or {}).get("peak_bytes_in_use", resident)
        details["peak_bytes"] = peak if alone else None
    return benchmarks_of(job, answer, (name, EVALUATION))


def measure(options: argparse.Namespace) -> None:
    """Measures every case, prints the tables and writes the file as it goes."""
    cases = jobs_of(options)
    traced = []
    if options.trace:  # before this process takes the device
        plain = [j for j in cases if (j.mode, j.seeds) == (ours.MANY, None) and "train" in j.what]
        traced = [trace(job, options.trace_dir) for job in plain]
    if options.launches > 1:
        recorder = relaunched(options)
    else:
        recorder = Recorder(options.output, launch.describe(mesh.select_device(options.platform)))
        for number, job in enumerate(cases):
            with excluding(recorder, ", ".join(map(str, list(named(job).values())[1:]))):
                for benchmark in time_job(job, alone=number == 0):
                    recorder.add(benchmark)
            recorder.write()
    for row in traced:
        recorder.row("trace", **row)
    recorder.finish(report)


def trace(job: jobs.Job, folder: Path | None = None) -> dict[str, Any]:
    """The row of the table "trace" for a job's step, from a process of its own."""
    question = dataclasses.asdict(job) | {"folder": str(folder.resolve()) if folder else None}
    return launch.ask("benchmarks.workers.trace", question)


def relaunched(options: argparse.Namespace) -> Recorder:
    """The same from processes of their own, each a launch."""
    recorder = Recorder(options.output, {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        own = {"output": file, "launches": 1, "trace": False, "trace_dir": None}
        for number in range(options.launches):
            launch.run(launch.command("benchmarks.step", vars(options) | own), show=True)
            recorder.take_in(results.read(file), launch=number)
            recorder.write()
    return recorder


def report(found: Results) -> list[str]:
    """The tables."""
    rows, memory = [], []
    for case in found.cases(TRAIN, EVALUATION):
        b, n = case.first, len(case.launches_s)
        speeds = timing.modes(case.launches_s if n > 1 else b.samples_s)
        notes = [" or ".join(f"{1e3 * s:.4g}" for s in speeds)] * (len(speeds) > 1)
        notes += [b.summary.warning.partition(":")[0]] if n == 1 else []
        networks = int(b.mode.split()[0]) if b.mode[:1].isdecimal() else 1
        images = networks * b.batch_size if b.name == TRAIN else jobs.Job.test_size
        interval = timing.interval95(case.launches_s) or ()
        names = [
            b.name,
            b.model,
            str(b.batch_size),
            b.precision,
            b.mode,
            f"{n} × {len(b.samples_s)}",
        ]
        times = [f"{1e3 * case.seconds:.4g}", " to ".join(f"{1e3 * end:.4g}" for end in interval)]
        rows.append(
            [*names, *times, f"{images / case.seconds:,.0f}", "; ".join(filter(None, notes))]
        )
        if b.details.get("program_bytes"):
            sizes = (b.details.get(f"{name}_bytes") for name in MEMORY)
            megabytes = [f"{size / 1e6:.4g}" if size else "-" for size in sizes]
            memory.append([b.model, str(b.batch_size), b.mode, *megabytes])
    headings = ["", "model", "batch", "precision", "mode", "launches × samples", "ms"]
    headings += ["95 % of launches", "images/s", ""]
    sized = ["model", "batch", "mode", *MEMORY]
    return [
        results.table("Times", headings, rows),
        results.table("Memory of a training step, MB", sized, memory),
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
    sys.exit(launch.main(__doc__, measure, FLAGS))
