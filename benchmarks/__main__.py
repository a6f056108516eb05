"""Measures the device at hand and writes a card.

    python -m benchmarks [--budget_minutes=9] [--only step roofline]

Parts run in order of value, each in processes of its own as its own command would, until the budget
is spent; each is saved when it ends. The folder, by default benchmarks/results/<device>-<UTC time>,
gets `results.json`, which `python -m benchmarks.compare` reads, and `card.md`. With --output naming
a folder of the same device, commit and JAX, what is missing there is added.
"""

import argparse
import datetime
import re
import shlex
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
from benchmarks.results import Recorder, Results, say
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError, unknown_choice

MODULES: dict[str, Any] = {
    "step": step,
    "peers": peers,
    "roofline": roofline,
    "sweep": sweep,
    "time_to_accuracy": time_to_accuracy,
    "seeds": step,
    "ledger": ledger,
    "lowering": lowering,
}
TRAIN = ("time_to_accuracy", "ledger")  # they need data, and measure compilation
SAME = ("platform", "device", "cpu", "git_commit", "jax")
MINUTES_ON_CPU, MINUTES = 4.0, 9.0


class Part(NamedTuple):
    """A part of the suite.

    Attributes:
        name: a key of `MODULES`.
        guess_s: how long it should take; it is not begun with less time left.
        runs: the flags of each process.
    """

    name: str
    guess_s: float
    runs: list[dict[str, Any]]


def plan(platform: str, models: list[str], launches: int) -> list[Part]:
    """The parts in order of value."""
    many: dict[str, Any] = {"mode": "many", "what": "train"}
    known = [model for model in models if model in peers.COMPARABLE][-1:]
    if platform == "cpu":
        small = [m for m in models if m != "cnn"]  # a step of the CNN takes 0.1 s or more
        cnn = [m for m in models if m == "cnn"]
        rivals = {"frameworks": "pytorch", "modes": "eager", "repeats": 3}
        steps = [{"model": small, "launches": launches, "repeats": 5}, many | {"model": cnn}]
        return [
            Part("step", 70, steps),
            Part("peers", 60, [{"model": known, "what": "train", **rivals}]),
            Part("roofline", 50, [{"model": models, "repeats": 5}]),
            Part("sweep", 20, [{"model": small, "batch_size": (1, 16, 256, 4096), "repeats": 3}]),
            Part("time_to_accuracy", 25, [{"model": small}]),
            Part("ledger", 25, [{"model": small}]),
            Part("lowering", 12, [{"model": models}]),
            Part("seeds", 12, [many | {"model": small, "mode": "seeds", "repeats": 3}]),
        ]
    last, half = models[-1:], {"precision": "bfloat16"}
    steps = [half | {"model": models, "mode": "many", "launches": launches, "repeats": 10}]
    steps += [half | many | {"model": models, "mode": ["one", "host"], "repeats": 10}]
    graphs = ["eager", *(peer.mode for peer in peers.GRAPHS)]
    rivals = {"frameworks": "pytorch", "modes": graphs, "what": "train"}
    sizes = (1, 16, 100, 1024, 4096)
    return [
        Part("step", 120, steps),
        Part("peers", 200, [half | {"model": known, **rivals}]),
        Part("roofline", 60, [half | {"model": models}]),
        Part("sweep", 40, [half | {"model": last, "batch_size": sizes, "repeats": 5}]),
        Part("time_to_accuracy", 40, [half | {"model": last, "preset": "fast", "repeats": 5}]),
        Part("seeds", 15, [half | many | {"model": models, "mode": "seeds"}]),
        Part("ledger", 30, [half | {"model": last}]),
        Part("lowering", 12, [half | {"model": models}]),
    ]


def measure(options: argparse.Namespace) -> None:
    """Runs the parts that fit into the budget, and writes the card after each."""
    started = time.monotonic()
    for name in options.only or ():
        if name not in MODULES:
            raise unknown_choice("part", name, MODULES)
    context = launch.where(options.platform)
    platform = context["platform"]
    minutes = options.budget_minutes or (MINUTES_ON_CPU if platform == "cpu" else MINUTES)
    recorder, earlier = open_folder(options.output, context)
    folder = recorder.output.parent  # pyright: ignore[reportOptionalMemberAccess]
    data: dict[str, Any] = {}
    try:
        data = launch.prepare_data(options)
        recorder.found.context["dataset"] = data["dataset"]
    except MnistJaxError as error:
        recorder.exclude("data", str(error))
    with tempfile.TemporaryDirectory() as scratch:
        for part in plan(platform, options.model, options.launches):
            wanted = part.name in (options.only or MODULES) and any(x["model"] for x in part.runs)
            if part.name in earlier or not wanted:
                continue
            left_s = 60 * minutes - (time.monotonic() - started)
            if left_s < part.guess_s:
                times = f"about {part.guess_s:.0f} s, and {max(0, left_s):.0f} s are left"
                recorder.exclude(part.name, f"it takes {times}; repeat with --output={folder}")
            elif part.name not in TRAIN or data:
                common = {"platform": platform} | (data if part.name in TRAIN else {})
                if part.name == "peers":
                    common["peers_python"] = options.peers_python
                run_part(part, common, recorder, left_s, Path(scratch))
            recorder.write()
            write_card(folder, recorder.found)
    print(f"written: {folder}/card.md and results.json")
    if not recorder.found.benchmarks and not recorder.found.tables:
        raise DeviceError("nothing could be measured; see the messages above")


def open_folder(folder: Path | None, context: dict[str, Any]) -> tuple[Recorder, set[str]]:
    """A recorder of the folder's results.json, and the parts that are complete there.

    Raises:
        UsageError: those are of another device, commit or JAX.
    """
    if folder is None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        name = re.sub(r"[^a-z0-9]+", "-", card.device_name(context).lower()).strip("-")
        folder = launch.ROOT / "benchmarks" / "results" / f"{name}-{now}"
    file = folder / "results.json"
    recorder = Recorder(file, context | {"parts": {}})
    if not file.is_file():
        return recorder, set()
    found = results.read(file)
    for field in SAME:
        there, here = found.context.get(field), context[field]
        if there != here:
            message = f"{file} has {field} {there!r}; here it is {here!r}; choose another --output"
            raise UsageError(message)
    parts = {name: entry for name, entry in found.context["parts"].items() if entry["complete"]}
    kept = [b for b in found.benchmarks if b.details["part"] in parts]
    tables = {k: [row for row in rows if row["part"] in parts] for k, rows in found.tables.items()}
    recorder.take_in(Results(found.context | {"excluded": {}}, kept, tables))
    recorder.found.context["parts"] = parts
    return recorder, set(parts)


def run_part(
    part: Part, common: dict[str, Any], recorder: Recorder, left_s: float, scratch: Path
) -> None:
    """Runs the commands of a part within the time left and takes in what each has written."""
    started = time.monotonic()
    parts = recorder.found.context["parts"]
    entry = parts.setdefault(part.name, {"commands": [], "complete": True, "seconds": 0.0})
    # If their compilation is in no clock, processes share it.
    variables = {} if part.name in TRAIN else launch.shared_cache(scratch)
    for words in part.runs:
        if not words["model"]:
            continue
        file = scratch / f"{part.name}-{len(entry['commands'])}.json"
        module = MODULES[part.name].__name__
        command = launch.command(module, common | words)
        shown = shlex.join(["python", *command[1:]]).replace(str(Path.home()), "~")
        entry["commands"].append(shown)
        say(f"== {part.name}: {shown}")
        timeout_s = max(1.0, left_s - (time.monotonic() - started))
        try:
            launch.run([*command, f"--output={file}"], variables, timeout_s=timeout_s, show=True)
        except launch.ProcessError as error:
            entry["complete"] = False
            recorder.exclude(f"{part.name}, {module}", str(error))
        if file.is_file():
            recorder.take_in(results.read(file), part=part.name)
    entry["seconds"] += round(time.monotonic() - started, 1)


def write_card(folder: Path, found: Results) -> None:
    """Writes the page."""
    reports = {}
    for name, module in MODULES.items():
        benchmarks = [b for b in found.benchmarks if b.details["part"] == name]
        tables = {k: [r for r in rows if r["part"] == name] for k, rows in found.tables.items()}
        if benchmarks or any(tables.values()):
            reports[name] = module.report(Results(found.context, benchmarks, tables))
    (folder / "card.md").write_text(card.markdown(found, reports))


if __name__ == "__main__":
    flags = f"output budget_minutes only model launches platform peers_python {launch.DATA}"
    sys.exit(launch.main(__doc__, measure, flags, launches=9))
