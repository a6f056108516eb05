"""The file that every benchmark writes, and its one reader.

    {"version": 1, "context": {...}, "benchmarks": [{"name": ..., "samples_s": [...], ...}],
     "tables": {"ledger": [{...}, ...]}}

`context` holds the environment and the command, `benchmarks` what was timed, a `Benchmark` each,
and `tables` what was counted, one object a row. Each list of samples is on one line.
"""

import dataclasses
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from mnist_jax.atomic_io import write_atomically
from mnist_jax.errors import DataError, DeviceError

VERSION = 1
DERIVED = ("median_s", "iqr_s", "ci95_s", "warning")  # written for readers, computed when read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One thing measured in one process. Every time is in seconds."""

    name: str
    """What was measured, such as train_step or evaluation."""
    samples_s: list[float]
    warmup_s: list[float] = dataclasses.field(default_factory=list)
    framework: str = "mnist_jax"
    model: str = ""
    batch_size: int = 0
    precision: str = "float32"
    mode: str = ""
    """How the framework was used, such as eager."""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What only this kind of benchmark has, such as the number of its launch."""

    @property
    def summary(self) -> timing.Summary:
        """Median, spread and warnings of the samples."""
        return timing.summarize(self.samples_s)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured. Launches of the same differ in their details only."""
        case = self.model, self.batch_size, self.precision, self.mode
        return self.name, self.framework, *case

    @property
    def case(self) -> str:
        """What was measured, in words."""
        framework = "" if self.framework == "mnist_jax" else self.framework
        batch = f"batch {self.batch_size}" if self.batch_size else ""
        words = (self.name, framework, self.model, batch, self.precision, self.mode)
        return ", ".join(filter(None, words))


class Case(NamedTuple):
    """All launches of the same thing: the first, and the estimate of each."""

    first: Benchmark
    launches_s: list[float]

    @property
    def seconds(self) -> float:
        """The median over the launches."""
        return float(np.median(self.launches_s))


class Results(NamedTuple):
    """What a file holds; see the top of this module."""

    context: dict[str, Any]
    benchmarks: list[Benchmark]
    tables: dict[str, list[dict[str, Any]]]

    @property
    def platform(self) -> str:
        """The kind of device, which decides the estimate of a time."""
        return self.context.get("platform", "cpu")

    def cases(self, *names: str, **fields: Any) -> list[Case]:
        """The launches of each thing of these names and with these fields."""
        found: dict[tuple[Any, ...], Case] = {}
        for b in self.benchmarks:
            if b.name in names and all(getattr(b, name) == x for name, x in fields.items()):
                seconds = timing.estimate(b.samples_s, self.platform)
                found.setdefault(b.key, Case(b, [])).launches_s.append(seconds)
        return list(found.values())


def check_writable(path: Path) -> None:
    """Fails before anything is measured in vain.

    Raises:
        DeviceError: no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        message = f"cannot write {path} ({error.strerror}); choose another --output"
        raise DeviceError(message) from error


def write(
    path: Path,
    context: Mapping[str, Any],
    benchmarks: Sequence[Benchmark] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Writes `path`, whole or not at all; adds the UTC time to the context."""
    entries = [dataclasses.asdict(b) | b.summary._asdict() for b in benchmarks]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"version": VERSION, "context": {**context, "date": now}}
    text = json.dumps(content | {"benchmarks": entries, "tables": tables or {}}, indent=1)
    # A list of numbers goes on one line. No JSON string holds a line break.
    lists = re.compile(r"\[\n\s+([-+.\w]+(?:,\n\s+[-+.\w]+)*)\n\s+\]")
    text = lists.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(path, (text + "\n").encode())


def read(path: Path) -> Results:
    """Reads a result file, or the `results.json` of a card's folder.

    Raises:
        DataError: there is no such file, or it is truncated, of another version or not ours.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            raise DataError(
                f"{path} has version {content['version']!r}; this program reads {VERSION}; "
                "measure again, or read it with the commit in its context"
            )
        benchmarks = [
            Benchmark(**{name: value for name, value in entry.items() if name not in DERIVED})
            for entry in content["benchmarks"]
        ]
        return Results(content["context"], benchmarks, content.get("tables", {}))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a result file") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no complete result file of these benchmarks ({error}); measure again"
        ) from error


def say(text: str) -> None:
    """Prints a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, for the terminal and the card. Numbers go right."""
    if not rows:
        return ""
    columns = [*zip(headings, *rows, strict=True)]
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(re.match(r"[-+]?\d|-?$", cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, right, strict=True)
        return f"| {' | '.join(c.rjust(w) if r else c.ljust(w) for c, w, r in parts)} |"

    marks = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([f"{title}:", "", line(headings), line(marks), *map(line, rows)])


class Recorder:
    """Collects what a command measures, prints each of it as it comes, and writes the file.

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
        module = f"benchmarks.{Path(sys.argv[0]).stem}".removesuffix(".__main__")
        command = ["python", "-m", module, *sys.argv[1:]]
        self.found = Results({"command": command, "excluded": {}, **context}, [], {})

    def add(self, benchmark: Benchmark) -> None:
        """Records a measurement."""
        self.found.benchmarks.append(benchmark)
        seconds = timing.estimate(benchmark.samples_s, self.found.platform)
        warning = benchmark.summary.warning
        say(f"{benchmark.case}: {1e3 * seconds:.4g} ms{f' ({warning})' if warning else ''}")

    def row(self, table: str, **values: Any) -> None:
        """Records a row of a table."""
        self.found.tables.setdefault(table, []).append(values)

    def take_in(self, found: Results, **details: Any) -> None:
        """Adds the findings of another file; `details` are added to each benchmark and row."""
        for b in found.benchmarks:
            self.found.benchmarks.append(dataclasses.replace(b, details=b.details | details))
        for name, rows in found.tables.items():
            self.found.tables.setdefault(name, []).extend(row | details for row in rows)
        for name, value in found.context.items():
            self.found.context.setdefault(name, value)
        self.found.context["excluded"].update(found.context.get("excluded", {}))

    def exclude(self, what: str, why: str) -> None:
        """Notes what could not be measured."""
        self.found.context["excluded"][what] = why
        say(f"excluded: {what}: {why}")

    def write(self) -> None:
        """Writes the file, if there is to be one. May be repeated as more comes in."""
        if self.output is not None:
            write(self.output, *self.found)

    def finish(self, report: Callable[[Results], Sequence[str]]) -> None:
        """Writes the file and prints the report, with what was excluded."""
        self.write()
        lost = [f"excluded: {what}: {why}" for what, why in self.found.context["excluded"].items()]
        print("\n\n".join(filter(None, [*report(self.found), *lost])))
