"""The file that every benchmark writes, and its one reader.

In JSON: `context` holds the environment and the command, `benchmarks` a `Benchmark` for each thing
timed in a process, and `tables` what was counted, one object a row.
"""

import dataclasses
import datetime
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from mnist_jax.atomic_io import write_atomically
from mnist_jax.errors import DataError, writing

# What must be equal in the contexts of two files of one device.
SAME_DEVICE = ("platform", "device", "cpu", "cpu_family_model", "instruction_set", "cores")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One thing measured in one process. Every time is in seconds."""

    name: str  # what was measured, such as train_step or evaluation
    samples_s: list[float]
    warmup_s: list[float] = dataclasses.field(default_factory=list)
    framework: str = "mnist_jax"
    model: str = ""
    batch_size: int = 0
    precision: str = "float32"
    mode: str = ""  # how the framework was used, such as eager
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # such as the launch's number

    @property
    def case(self) -> str:
        """What was measured, in words. Launches of the same differ in their details only."""
        framework = "" if self.framework == "mnist_jax" else self.framework
        batch = f"batch {self.batch_size}" if self.batch_size else ""
        words = (self.name, framework, self.model, batch, self.precision, self.mode)
        return ", ".join(filter(None, words))


class Case(NamedTuple):
    """All launches of the same thing, and the estimate of each."""

    first: Benchmark
    benchmarks: list[Benchmark]
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

    def cases(self, *names: str, **fields: Any) -> list[Case]:
        """The launches of each thing of these names, or of any, and with these fields."""
        found: dict[str, Case] = {}
        for b in self.benchmarks:
            if b.name in (names or [b.name]) and all(getattr(b, k) == x for k, x in fields.items()):
                case = found.setdefault(b.case, Case(b, [], []))
                case.benchmarks.append(b)
                case.launches_s.append(timing.estimate(b.samples_s, self.context["platform"]))
        return list(found.values())

    @property
    def size(self) -> int:
        """How many things were found."""
        return len(self.benchmarks) + sum(map(len, self.tables.values()))

    def part(self, name: str, *, rest: bool = False) -> "Results":
        """What one part of the suite has found or, for the rest, what all others have."""
        benchmarks = [b for b in self.benchmarks if (b.details["part"] == name) != rest]
        tables = {k: [r for r in v if (r["part"] == name) != rest] for k, v in self.tables.items()}
        return Results(self.context, benchmarks, tables)


def write(path: Path, found: Results) -> None:
    """Writes `path`, whole or not at all; adds the UTC time to the context."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content: dict[str, Any] = {"version": 1, "context": {**found.context, "date": now}}
    content["benchmarks"] = [dataclasses.asdict(b) for b in found.benchmarks]
    text = json.dumps(content | {"tables": found.tables}, indent=1)
    # A list of numbers goes on one line. No JSON string holds a line break.
    lists = re.compile(r"\[\n\s+([-+.\w]+(?:,\n\s+[-+.\w]+)*)\n\s+\]")
    text = lists.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    write_atomically(path, (text + "\n").encode())


def parse(content: Mapping[str, Any]) -> Results:
    """The content of a result file; unknown fields of a benchmark are ignored."""
    fields = [field.name for field in dataclasses.fields(Benchmark)]
    entries = [{k: b[k] for k in fields if k in b} for b in content["benchmarks"]]
    return Results(content["context"], [Benchmark(**e) for e in entries], content["tables"])


def read(path: Path) -> Results:
    """Reads a result file, or the `results.json` of a card's folder."""
    path = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != 1:
            raise ValueError(f"version {content['version']}, not 1")
        return parse(content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read {path} as a result file ({error}); measure again") from error


def interval95(values: Sequence[float]) -> Sequence[float]:
    """The exact 95 % interval of a median by order statistics; empty for fewer than 6 values."""
    from scipy.stats import quantile_test

    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return () if np.isnan(low) else (float(low), float(high))


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


@dataclasses.dataclass
class Recorder:
    """Collects what a command measures and writes the file."""

    output: Path | None
    context: dataclasses.InitVar[Mapping[str, Any]]  # that `found` begins with
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its processes
    deadline: float | None = None  # the `time.monotonic` at which they end

    def __post_init__(self, context: Mapping[str, Any]):
        if self.output is not None:
            with writing(self.output, "--output"):  # before anything is measured in vain
                self.output.parent.mkdir(parents=True, exist_ok=True)
                self.output.open("ab").close()
        self.found = Results({"command": sys.orig_argv, "excluded": {}, **context}, [], {})

    def left_s(self) -> float | None:
        """Seconds to the deadline, if there is one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def row(self, table: str, **values: Any) -> None:
        """Records a row of a table."""
        self.found.tables.setdefault(table, []).append(values)

    def take_in(self, found: Results, prefix: str = "", **details: Any) -> None:
        """Adds other findings: each benchmark and row with these details, each name prefixed."""
        for b in found.benchmarks:
            own: dict[str, Any] = {"name": prefix + b.name, "details": b.details | details}
            self.found.benchmarks.append(dataclasses.replace(b, **own))
        for name, rows in found.tables.items():
            self.found.tables.setdefault(name, []).extend(row | details for row in rows)
        excluded = self.found.context["excluded"] | found.context.get("excluded", {})
        self.found.context.update(found.context | {"excluded": excluded})

    def exclude(self, what: str, why: str) -> None:
        """Notes what could not be measured."""
        self.found.context["excluded"][what] = why
        say(f"excluded: {what}: {why}")

    def write(self) -> None:
        """Writes the file, if there is to be one."""
        if self.output is not None:
            with writing(self.output, "--output"):
                write(self.output, self.found)
