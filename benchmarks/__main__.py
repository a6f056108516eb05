"""Measures the device at hand and writes a card.

    python -m benchmarks [--budget_minutes=9] [--only step roofline]

Parts run in order of value, each in processes of its own, until the budget is spent; each is saved
when it ends. The folder, by default benchmarks/results/<device>-<UTC time>, gets `results.json`,
which `python -m benchmarks.compare` reads, and `card.md`. With --output naming a folder of the same
device, commit and JAX, what is missing there is added.
"""

import argparse
import datetime
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    card,
    launch,
    ledger,
    lowering,
    peers,
    results,
    roofline,
    step,
    sweep,
    time_to_accuracy,
)
from benchmarks.results import Recorder, say
from benchmarks.workers import job as jobs
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError

PARTS = step, peers, roofline, sweep, time_to_accuracy, step, ledger, lowering
MODULES: dict[str, Any] = dict(zip(launch.PARTS, PARTS, strict=True))
SAME = ("platform", "device", "cpu", "git_commit", "jax")
MINUTES_ON_CPU, MINUTES = 4.0, 9.0


class Part(NamedTuple):
    """A part of the suite."""

    name: str  # a key of `MODULES`
    guess_s: float  # how long it should take; it is not begun with less time left
    runs: list[dict[str, Any]]  # the flags of each time it runs


def plan(platform: str, models: list[str], launches: int) -> list[Part]:
    """The parts in order of value."""
    many: dict[str, Any] = {"mode": ["many"], "what": ["train"]}
    seeds = many | {"mode": ["seeds"], "repeats": 3}
    known = [model for model in models if model in jobs.HIDDEN_SIZES][-1:]
    rivals: dict[str, Any] = {"model": known, "frameworks": ["pytorch"]}
    if platform == "cpu":
        small = [m for m in models if m != "cnn"]  # a step of the CNN takes 0.1 s or more
        cnn = [m for m in models if m == "cnn"]
        steps = [
            {"model": small, "mode": ["many"], "launches": launches, "repeats": 4},
            {"model": small, "mode": ["one"], "what": ["train"], "repeats": 4},
            many | {"model": cnn},
        ]
        sizes = [1, 16, 256, 4096]
        return [
            Part("step", 70, steps),
            Part("peers", 60, [rivals | {"modes": [jobs.EAGER], "repeats": 3}]),
            Part("roofline", 35, [{"model": models, "repeats": 5}]),
            Part("sweep", 15, [{"model": small, "batch_size": sizes, "repeats": 3}]),
            Part("time_to_accuracy", 20, [{"model": small, "batch_size": None, "repeats": 3}]),
            Part("ledger", 25, [{"model": small}]),
            Part("lowering", 10, [{"model": models}]),
            Part("seeds", 10, [seeds | {"model": small}]),
        ]
    last, half = models[-1:], {"precision": ["bfloat16"]}
    steps = [half | {"model": models, "mode": ["many"], "launches": launches, "repeats": 10}]
    steps += [half | many | {"model": models, "mode": ["one", "host"], "repeats": 10}]
    rivals["modes"] = [jobs.EAGER, *(mode for _, mode in peers.GRAPHS)]
    sizes = [1, 16, 100, 1024, 4096]
    accuracy = {"model": last, "batch_size": None, "preset": "fast", "repeats": 5}
    return [
        Part("step", 120, steps),
        Part("peers", 200, [half | rivals | {"repeats": 5}]),
        Part("roofline", 60, [half | {"model": models, "repeats": 10}]),
        Part("sweep", 40, [half | {"model": last, "batch_size": sizes, "repeats": 5}]),
        Part("time_to_accuracy", 40, [half | accuracy]),
        Part("seeds", 15, [half | seeds | {"model": models}]),
        Part("ledger", 30, [half | {"model": last}]),
        Part("lowering", 12, [half | {"model": models}]),
    ]


def measure(options: argparse.Namespace) -> None:
    """Runs the parts that fit into the budget, and writes the card after each.

    Raises:
        DeviceError: nothing could be measured.
    """
    started = time.monotonic()
    context = launch.where(options.platform)
    options.platform = platform = context["platform"]
    minutes = options.budget_minutes or (MINUTES_ON_CPU if platform == "cpu" else MINUTES)
    recorder, folder = open_folder(options.output, context)
    deadline = started + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        for part in plan(platform, options.model, options.launches):
            wanted = part.name in (options.only or MODULES) and any(x["model"] for x in part.runs)
            if part.name in recorder.found.context["parts"] or not wanted:
                continue
            left_s = max(0.0, deadline - time.monotonic())
            if left_s < part.guess_s:
                times = f"about {part.guess_s:.0f} s, and {left_s:.0f} s are left"
                recorder.exclude(part.name, f"it takes {times}; repeat with --output={folder}")
            else:
                cache = launch.shared_cache(scratch)
                own = Recorder(None, recorder.found.context, variables=cache, deadline=deadline)
                run_part(part, options, own)
                recorder.take_in(own.found, part=part.name)
            write_card(folder, recorder)
    print(f"written: {folder}/card.md and results.json")
    if not recorder.found.benchmarks and not recorder.found.tables:
        raise DeviceError("nothing could be measured; see the messages above")


def open_folder(folder: Path | None, context: dict[str, Any]) -> tuple[Recorder, Path]:
    """A recorder of the folder's results.json, with the parts that are complete there.

    Raises:
        UsageError: those are of another device, commit or JAX.
    """
    if folder is None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        name = re.sub(r"[^a-z0-9]+", "-", card.device_name(context).lower()).strip("-")
        folder = launch.ROOT / "benchmarks" / "results" / f"{name}-{now}"
    file = folder / "results.json"
    earlier = results.read(file) if file.is_file() else None
    recorder = Recorder(file, context | {"parts": {}})
    if earlier:
        for field in SAME:
            there, here = earlier.context.get(field), context[field]
            if there != here:
                message = f"{file} has {field} {there!r}; here it is {here!r}"
                raise UsageError(f"{message}; choose another --output")
        for name, entry in earlier.context["parts"].items():
            if entry["complete"]:
                recorder.found.context["parts"][name] = entry
                recorder.take_in(earlier.part(name)._replace(context={}))
    return recorder, folder


def run_part(part: Part, options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures a part until the recorder's deadline."""
    started = time.monotonic()
    entry = recorder.found.context["parts"].setdefault(part.name, {"complete": True})
    for words in (words for words in part.runs if words["model"]):
        say(f"== {part.name}: {words}")
        own = argparse.Namespace(**vars(options) | {"launches": 1} | words)
        try:
            MODULES[part.name].measure(own, recorder)
        except MnistJaxError as error:
            entry["complete"] = False
            recorder.exclude(part.name, str(error))
    entry["seconds"] = round(time.monotonic() - started, 1)


def write_card(folder: Path, recorder: Recorder) -> None:
    """Writes the results and the page."""
    recorder.write()
    found, reports = recorder.found, {}
    for name, module in MODULES.items():
        part = found.part(name)
        if part.benchmarks or any(part.tables.values()):
            reports[name] = module.report(part)
    (folder / "card.md").write_text(card.markdown(found, reports))


if __name__ == "__main__":
    flags = f"output budget_minutes only model launches platform peers_python {launch.DATA}"
    sys.exit(launch.main(__doc__, measure, flags, launches=9))
