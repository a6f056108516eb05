"""The file that every benchmark writes, and the one reader of it.

    {"version": 1, "context": {...}, "benchmarks": [{"name": ..., "samples_s": [...], ...}],
     "tables": {"memory": [{...}, ...]}}

`context` is the environment and the command. What was timed stands in `benchmarks`, a `Benchmark`
each: one schema, by which the writer writes and the reader checks. What was counted stands in
`tables`, by the part that counted it, a plain object a row.
"""

import dataclasses
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import launch, timing
from mnist_jax.atomic_io import write_atomically
from mnist_jax.errors import DataError, DeviceError

VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One thing measured in one process. Every time is in seconds."""

    name: str
    """What was measured, such as train_step or evaluation."""
    framework: str
    model: str
    batch_size: int
    precision: str
    mode: str
    """How the framework was used, such as eager."""
    warmup_s: list[float]
    samples_s: list[float]
    median_s: float
    iqr_s: float
    ci95_s: list[float]
    warning: str
    """Why the samples should not be trusted; "" where nothing speaks against them."""
    details: dict[str, Any]
    """What only this kind of benchmark has, such as the round it belongs to."""

    @classmethod
    def of(
        cls, samples_s: Sequence[float], warmup_s: Sequence[float] = (), **fields: Any
    ) -> "Benchmark":
        """A benchmark from its samples, which are summarized, and the fields that name it."""
        summary = timing.summarize(samples_s)._asdict()
        return cls(warmup_s=list(warmup_s), samples_s=list(samples_s), **summary, **fields)


KEY = ("name", "framework", "model", "batch_size", "precision", "mode")  # what makes two alike


def key(benchmark: Benchmark) -> tuple[Any, ...]:
    """What was measured. Rounds and launches of the same differ in their details only."""
    return tuple(getattr(benchmark, field) for field in KEY)


def check_writable(path: Path) -> None:
    """To be called before measuring, so that nothing is measured in vain.

    Raises:
        DeviceError: no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise _unwritable(path, error) from error


class Results(NamedTuple):
    """What a file holds; see above."""

    context: dict[str, Any]
    benchmarks: list[Benchmark]
    tables: dict[str, list[dict[str, Any]]]


def write(
    path: Path,
    context: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Writes `path`, whole or not at all; adds the UTC time to the context.

    Raises:
        DeviceError: it cannot be written.
    """
    content = {
        "version": VERSION,
        "context": {**context, "date": datetime.datetime.now(datetime.UTC).isoformat()},
        "benchmarks": [dataclasses.asdict(benchmark) for benchmark in benchmarks],
        "tables": tables or {},
    }
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def read(path: Path) -> Results:
    """What is in a file that `write` wrote.

    Raises:
        DataError: there is no such file, or it is truncated, of another version or not ours.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a result file") from error
    except ValueError as error:
        raise DataError(f"{path} is truncated or not JSON ({error}); measure again") from error
    if not isinstance(content, dict) or "version" not in content or "benchmarks" not in content:
        raise DataError(f"{path} is not a result file of these benchmarks; name one that is")
    if content["version"] != VERSION:
        raise DataError(
            f"{path} is of version {content['version']!r}; this program reads {VERSION}; "
            "measure again, or read it with the commit in its context"
        )
    try:
        benchmarks = [_benchmark(entry) for entry in content["benchmarks"]]
        tables = {
            name: [dict(row) for row in rows] for name, rows in content.get("tables", {}).items()
        }
        return Results(dict(content["context"]), benchmarks, tables)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); measure again") from error


def _benchmark(entry: Any) -> Benchmark:
    benchmark = Benchmark(**entry)  # refuses missing and unknown fields
    for field in dataclasses.fields(Benchmark):
        kind = {"batch_size": int, "samples_s": list, "warmup_s": list, "details": dict}.get(
            field.name, str
        )
        derived = field.name in ("median_s", "iqr_s", "ci95_s", "warning")
        if not derived and not isinstance(value := getattr(benchmark, field.name), kind):
            raise TypeError(f"{field.name} is {value!r}")
    samples = benchmark.samples_s
    if not samples or not all(0 < sample < math.inf for sample in samples):
        raise ValueError(f"samples_s of {benchmark.name} is {samples}")
    # What is derived from the samples is derived again, not believed.
    return dataclasses.replace(benchmark, **timing.summarize(samples)._asdict())


class Recorder:
    """Collects what one command measures, says each of it as it comes, and writes the file.

    Args:
        output: the file; None for none.
        context: the environment.

    Raises:
        DeviceError: the file cannot be written.
    """

    def __init__(self, output: Path | None, context: Mapping[str, Any]):
        if output is not None:
            check_writable(output)
        self.output = output
        *_, module = Path(sys.argv[0]).with_suffix("").as_posix().rpartition("/benchmarks/")
        module = f"benchmarks.{module.replace('/', '.')}".removesuffix(".__main__")
        command = ["python", "-m", module, *sys.argv[1:]]
        self.context = {"command": command, "left_out": {}, **context}
        self.benchmarks: list[Benchmark] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, benchmark: Benchmark) -> Benchmark:
        """Takes a measurement in."""
        self.benchmarks.append(benchmark)
        b = benchmark
        peer = "" if b.framework == "mnist_jax" else f"{b.framework}, "
        case = f"{peer}{b.model}, batch {b.batch_size}, {b.precision}, {b.mode}: " * bool(b.model)
        warning = f" ({b.warning})" if b.warning else ""
        launch.say(f"{case}{b.name} {1e3 * b.median_s:.4g} ms{warning}")
        return benchmark

    def row(self, table: str, **values: Any) -> None:
        """Takes a row of a table in."""
        self.tables.setdefault(table, []).append(values)

    def take_in(self, found: Results, said_by: str = "", **of: Any) -> None:
        """Adds what a command of its own found.

        Args:
            found: what its file holds.
            said_by: stands before what was left out there.
            of: goes to the details of each benchmark and to each row.
        """
        for b in found.benchmarks:
            self.benchmarks.append(dataclasses.replace(b, details=b.details | of))
        for table, rows in found.tables.items():
            self.tables.setdefault(table, []).extend(row | of for row in rows)
        for what, why in found.context.get("left_out", {}).items():
            self.context["left_out"][f"{said_by}{what}"] = why

    def leave_out(self, what: str, why: str) -> None:
        """Notes what could not be measured."""
        self.context["left_out"][what] = why
        launch.say(f"{what} is left out: {why}")

    @property
    def found(self) -> Results:
        """All that came in so far."""
        return Results(self.context, self.benchmarks, self.tables)

    def write(self) -> None:
        """Writes the file, if there is to be one. May be repeated as more comes in."""
        if self.output is not None:
            write(self.output, *self.found)


def _unwritable(path: Path, error: OSError) -> DeviceError:
    return DeviceError(f"cannot write {path} ({error.strerror}); choose another --output")
