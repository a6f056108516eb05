"""Times training steps and evaluation: latency and images a second.

    python -m benchmarks.step --model mlp --batch_size 100 4096 --output FILE

For each network, batch size, precision and mode. What is inside the clock stands in
`benchmarks.peer_workers.job`; images are random. With --launches=7 each is measured in seven
processes of their own, one after the other: times drift more between processes than within one,
and only such files can be told apart by `python -m benchmarks.compare`.
"""

import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import launch, results, timing
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax import errors
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.mesh import Layout
from mnist_jax.reporting.profiling import costliest, make_folder, profiled, show_costliest
from mnist_jax.runs import environment

FEW = 5  # samples, below which no interval is shown
TRAIN, EVALUATION = "train_step", "evaluation"
MODES = {"many": ours.MANY, "one": ours.ONE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options):
    """The flags."""

    mode: tuple[Literal["many", "one"], ...] = ("many", "one")
    """Steps a call of the program: many, or one."""
    what: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    """A training step, the evaluation of 10,000 images, or both."""
    devices: int | Literal["all"] = 1
    """How many of the platform's devices a batch is spread over: a whole number or all."""
    launches: int = 1
    """Processes that measure each case, one after the other. python -m benchmarks.compare judges
    files of 5 or more."""
    profile: Path | None = None
    """Also write a trace of some training steps into this folder, for TensorBoard or Perfetto, and
    list the ten costliest operations. None: do not."""
    traced_steps: int = 20
    """Steps of that trace, after as many that are not in it."""


def jobs_of(options: launch.Options, modes: tuple[str, ...], what: tuple[str, ...]) -> list[Any]:
    """A job for each network, batch size, precision and mode."""
    cases = itertools.product(options.model, options.batch_size, options.precision, modes)
    made = [
        jobs.Job(
            model=model,
            mode=MODES[mode],
            # An evaluation is many batches of its own size, whatever the mode.
            what=tuple(w for w in what if w == "train" or mode == modes[0]),
            batch_size=batch_size,
            precision=precision,
            samples=options.repeats,
        )
        for model, batch_size, precision, mode in cases
    ]
    return [job for job in made if job.what]


def named(job: jobs.Job, name: str) -> dict[str, Any]:
    """The fields by which a benchmark of a job is found again."""
    return {
        "name": name,
        "framework": "mnist_jax",
        "model": job.model,
        "batch_size": job.batch_size,
        "precision": job.precision,
        "mode": job.mode,
    }


@contextlib.contextmanager
def left_out_if_impossible(recorder: Recorder, what: str) -> Iterator[None]:
    """What does not fit into memory, or XLA or the device cannot do, is noted; the rest goes on."""
    try:
        yield
    except (DeviceError, UsageError, launch.ProcessError) as error:
        recorder.leave_out(what, str(error))
    except MemoryError:
        recorder.leave_out(what, "out of memory")
    except jax.errors.JaxRuntimeError as error:
        memory = "out of memory: " if errors.is_out_of_memory(error) else ""
        recorder.leave_out(what, f"{memory}{errors.first_line(error)}")


def describe(job: jobs.Job) -> str:
    """A job in words."""
    return f"{job.model}, batch {job.batch_size}, {job.precision}, {job.mode}"


def spread_over(job: jobs.Job, layout: Layout) -> jobs.Job:
    """The job by the name that it has on these devices."""
    count = len(layout.devices)
    return job if count == 1 else dataclasses.replace(job, mode=f"{job.mode}, {count} devices")


def time_job(job: jobs.Job, layout: Layout, **details: Any) -> list[Benchmark]:
    """The benchmarks of one job on these devices, in this process."""
    memory, device = {}, layout.devices[0]

    def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
        workload = ours.make(job, data, layout=layout)
        memory["temporaries_bytes"] = workload.analysis.temp_size_in_bytes
        memory["program_bytes"] = ours.needed_bytes(workload.analysis)
        return workload

    made = []
    with jax.default_matmul_precision(devices.MATMUL_PRECISION[job.precision]):
        answer = jobs.run(job, make)
    for what, name in (("train", TRAIN), ("eval", EVALUATION)):
        if what in answer:
            times = timing.Timing(**answer[what])
            more = {"steps_per_sample": times.steps_per_sample, **details}
            if what == "train":
                more |= memory | {"peak_bytes": _peak_bytes(device, answer["peak_rss_bytes"])}
                more["harness_s"] = answer["harness_s"]
            names = named(spread_over(job, layout), name)
            found = Benchmark.of(times.samples_s, times.warmup_s, details=more, **names)
            made.append(found)
    return made


def _peak_bytes(device: jax.Device, resident: int) -> int:
    """The most memory in use so far: the device's own, or else this process's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("peak_bytes_in_use", resident)


def measure(options: Options) -> None:
    """Measures every case, prints the table and writes the file as it goes."""
    if options.profile is not None:
        make_folder(options.profile)
    if options.launches > 1:
        recorder = relaunched(options)
    else:
        device = devices.select_device(options.platform)
        layout = Layout.over(devices.select_devices(device, options.devices))
        recorder = Recorder(options.output, environment.describe(device))
        for job in jobs_of(options, options.mode, options.what):
            with left_out_if_impossible(recorder, describe(spread_over(job, layout))):
                for benchmark in time_job(job, layout):
                    recorder.add(benchmark)
            recorder.write()
    launch.show(report(recorder.found))
    if options.profile is not None:
        trace(options, options.profile)


def in_own_process(job: jobs.Job, platform: str) -> list[Benchmark]:
    """The benchmarks of one job, from a process that does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        case: dict[str, Any] = {
            "model": (job.model,),
            "batch_size": (job.batch_size,),
            "precision": (job.precision,),
            "platform": platform,
            "mode": tuple(name for name, mode in MODES.items() if mode == job.mode),
            "what": job.what,
        }
        launch.part("benchmarks.step", Options(output=output, repeats=job.samples, **case))
        found = results.read(output)
    for why in found.context["left_out"].values():
        raise DeviceError(why)
    return found.benchmarks


def relaunched(options: Options) -> Recorder:
    """The same by processes of their own, of whom each is a launch."""
    recorder = Recorder(options.output, {})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        once = dataclasses.replace(options, output=output, launches=1, profile=None)
        for number in range(options.launches):
            launch.part("benchmarks.step", once)
            found = results.read(output)
            recorder.context = found.context | recorder.context
            recorder.take_in(found, launch=number)
            recorder.write()
    return recorder


def trace(options: Options, folder: Path) -> None:
    """Profiles the steps of the first case, after as many that are not."""
    count = options.traced_steps
    device = devices.select_device(options.platform)
    layout = Layout.over(devices.select_devices(device, options.devices))
    job = jobs_of(options, options.mode, ("train",))[0]
    with jax.default_matmul_precision(devices.MATMUL_PRECISION[job.precision]):
        workload = ours.make(job, jobs.make_data(job), layout=layout)
        state = jax.block_until_ready(workload.train(workload.state, count))
        with profiled(folder):
            jax.block_until_ready(workload.train(state, count))
    print(f"{describe(spread_over(job, layout))}, {count} steps, traced in {folder}")
    show_costliest(costliest(folder), Console())


def report(found: Results) -> list[Table | str]:
    """The table, and what was left out."""
    table = Table(title="medians; of several launches, of theirs", box=box.SIMPLE)
    for heading in ("", "model", "batch", "precision", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", "ms", "95 %", "images/s", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for case in grouped(found.benchmarks):
        low, high = (1e3 * end for end in case.ci95_s)
        n = len(case.samples_s)
        interval = f"{low:.4g} to {high:.4g}" if n >= FEW else "few"
        numbers = str(n), f"{1e3 * case.median_s:.4g}", interval
        names = case.name, case.model, str(case.batch_size), case.precision, case.mode
        doubt = "unstable" if case.warning else ""
        table.add_row(*names, *numbers, f"{images(case) / case.median_s:,.0f}", doubt)
    return [table, *harness_share(found.benchmarks), *left_out(found)]


def harness_share(benchmarks: Sequence[Benchmark]) -> list[str]:
    """A line on how much of a training step's sample the harness itself takes, at most."""
    shares = [
        b.details["harness_s"] / (b.median_s * b.details["steps_per_sample"])
        for b in benchmarks
        if "harness_s" in b.details
    ]
    return [f"the harness takes at most {100 * max(shares):.2g} % of a sample"] if shares else []


def left_out(found: Results) -> list[str]:
    """A line for everything that could not be measured."""
    return [f"left out: {what}: {why}" for what, why in found.context["left_out"].items()]


def grouped(benchmarks: Sequence[Benchmark]) -> list[Benchmark]:
    """One benchmark for all launches of the same: of several, their medians are its samples."""
    found: dict[tuple[Any, ...], list[Benchmark]] = {}
    for b in benchmarks:
        found.setdefault(results.key(b), []).append(b)
    return [
        Benchmark.of(
            [b.median_s for b in some] if len(some) > 1 else some[0].samples_s,
            **dict(zip(results.KEY, case, strict=True)),
            details=some[0].details,
        )
        for case, some in found.items()
    ]


def images(benchmark: Benchmark) -> int:
    """How many images one of its times is for."""
    return benchmark.batch_size if benchmark.name == TRAIN else jobs.Job.test_size


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.step", __doc__ or ""))
