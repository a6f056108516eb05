"""Measures the device at hand and writes a card.

    python -m benchmarks [--budget_minutes=13] [--only step roofline]

Parts run in order of value until the budget is spent. --output=FOLDER completes an earlier card.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import card, launch, ledger, lowering, peers, results, roofline, step, sweep
from benchmarks import time_to_accuracy as accuracy
from benchmarks.results import Recorder, say
from benchmarks.workers import job as jobs
from mnist_jax.errors import MnistJaxError, UsageError, writing
from mnist_jax.runs.environment import PACKAGES

MODULES: dict[str, Any] = {"step": step, "peers": peers, "roofline": roofline, "sweep": sweep}
MODULES |= {"time_to_accuracy": accuracy, "seeds": step, "ledger": ledger, "lowering": lowering}
SAME = (*results.SAME_DEVICE, *PACKAGES, "git_commit", "code_sha256", "variables", "flags")
MINUTES_ON_CPU, MINUTES = 4.0, 13.0


class Part(NamedTuple):
    """A part of the suite."""

    name: str  # a key of `MODULES`
    guess_s: float  # it is not begun with less time left
    runs: list[dict[str, Any]]  # the flags of each time it runs


def plan(platform: str, models: list[str], launches: int, *, peers_too: bool) -> list[Part]:
    """The parts in order of value; one that measures none of the models has no runs."""
    many: dict[str, Any] = {"mode": ["many"], "what": ["train"]}
    known = [m for m in ("cnn", *models) if m in models and m in jobs.HIDDEN_SIZES][:peers_too]
    if on_cpu := platform == "cpu":
        tries, rest, common = 3, [m for m in models if m != "cnn"], {}  # its step takes over 0.1 s
        others = [
            {"model": rest, "mode": ["one"], "what": ["train"], "repeats": 30},
            many | {"model": [m for m in models if m == "cnn"]},
        ]
        sizes, modes = [1, 16, 256, 4096], [jobs.EAGER]
    else:
        tries, rest, common = 20, models[-1:], {"precision": ["bfloat16"], "preset": "fast"}
        others = [
            {"model": models[:-1], "mode": ["many"], "repeats": 30},
            {"model": models, "mode": ["one", "host"], "what": ["train"], "repeats": 30},
        ]
        sizes, modes = [16, 100, 1024, 4096], [jobs.EAGER, *(mode for _, mode in peers.GRAPHS)]
    first = {"model": rest, "mode": ["many"], "launches": launches, "repeats": 30}
    against = {"frameworks": ["pytorch"], "modes": modes, "repeats": 3, "rounds": 3}
    last = {"model": rest[-1:]}
    rows = [  # seconds on a CPU and elsewhere, and the flags of each time it runs
        ("step", 70, 210, [first, *others]),
        ("peers", 80, 170, [{"model": known, **against}]),
        ("roofline", 40, 100, [{"model": models, "repeats": 20}]),
        ("sweep", 10, 110, [last | {"batch_size": sizes, "repeats": 15}]),
        ("time_to_accuracy", 15, 85, [last | {"batch_size": None, "repeats": tries}]),
        ("seeds", 25, 45, [many | last | {"mode": ["seeds"], "repeats": 15}]),
        ("ledger", 15, 40, [last]),
        ("lowering", 15, 15, [{"model": models}]),
    ]
    if on_cpu:  # these come late: the peers run the CNN's slow step ten times; seeds gain little
        rows.sort(key=lambda row: row[0] in ("peers", "seeds"))
    runs_of = {n: [common | x for x in runs if x["model"]] for n, _, _, runs in rows}
    return [Part(n, s if on_cpu else t, runs_of[n]) for n, s, t, _ in rows]


def measure(options: argparse.Namespace) -> Recorder:
    """Runs the parts that fit into the budget, and writes the card after each."""
    started = time.monotonic()
    context = launch.where(options.platform)
    options.platform = platform = context["platform"]
    context["flags"] = options.flags | {"model": options.model, "launches": options.launches}
    if (minutes := options.budget_minutes) is None:
        minutes = MINUTES_ON_CPU if platform == "cpu" else MINUTES
    peers_too = platform != "tpu" and options.dataset in ("auto", "mnist") and not options.options
    recorder, folder = open_folder(options.output, context)
    done, parts = recorder.found.context["parts"], []
    for part in plan(platform, options.model, options.launches, peers_too=peers_too):
        entry = done.get(part.name, {})
        failed = options.only and entry.get("excluded")  # it is tried again where it is named
        if part.name in (options.only or MODULES) and (failed or not entry.get("complete")):
            parts.append(part)
    deadline = started + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        cache = launch.shared_cache(scratch)
        for part in sorted(parts, key=lambda part: part.name in done):  # what is new comes first
            if (left_s := deadline - time.monotonic()) < part.guess_s or not part.runs:
                times = f"about {part.guess_s:.0f} s, and {max(0, left_s):.0f} s are left"
                why = f"it takes {times}; repeat with --output={folder}"
                no_part = f"not measured with these flags on a {platform}"
                recorder.exclude(part.name, why if part.runs else no_part)
                continue
            for what in (part.name, *done.get(part.name, {}).get("excluded", ())):  # tried again
                recorder.found.context["excluded"].pop(what, None)
            context = recorder.found.context | {"excluded": {}}  # of this part alone
            own = Recorder(None, context, variables=cache, deadline=deadline)
            try:
                run_part(part, options, own)
            finally:  # after Ctrl-C, too
                best = max(own.found, recorder.found.part(part.name), key=lambda found: found.size)
                recorder.found = recorder.found.part(part.name, rest=True)
                recorder.take_in(best._replace(context=own.found.context), part=part.name)
                write_card(folder, recorder)
    write_card(folder, recorder)
    print("\n".join(card.headline(recorder.found)))
    print(f"written: {folder}/card.md and results.json")
    return recorder


def open_folder(folder: Path | None, context: dict[str, Any]) -> tuple[Recorder, Path]:
    """A recorder with what the folder's results.json holds."""
    if folder is None:
        who = re.sub(r"[^a-z0-9]+", "-", card.device_name(context).lower()).strip("-")
        name = time.strftime(f"{who}-%Y%m%dT%H%M%SZ", time.gmtime())
        folder = launch.ROOT / "benchmarks" / "results" / name
    file = folder / "results.json"
    earlier = results.read(file) if file.is_file() and file.stat().st_size else None
    recorder = Recorder(file, context | {"parts": {}})
    if earlier:
        for field in SAME:
            if (there := earlier.context.get(field)) != context.get(field):
                message = f"{file} has {field} {there!r}; here it is {context.get(field)!r}"
                raise UsageError(f"{message}; choose another --output")
        parts, old = earlier.context.get("parts", {}), earlier.context.get("excluded", {})
        known = {*MODULES, *(k for entry in parts.values() for k in entry.get("excluded", ()))}
        kept = {"parts": parts, "excluded": {k: old[k] for k in old if k in known}}
        recorder.take_in(earlier._replace(context=earlier.context | recorder.found.context | kept))
    return recorder, folder


def run_part(part: Part, options: argparse.Namespace, recorder: Recorder) -> None:
    """Measures a part until the recorder's deadline."""
    started = time.monotonic()
    for words in part.runs:
        say(f"== {part.name}: {words}")
        own = argparse.Namespace(**vars(options) | {"launches": 1} | words)
        try:
            MODULES[part.name].measure(own, recorder)
        except MnistJaxError as error:
            recorder.exclude(part.name, str(error))
    lost, seconds = recorder.found.context["excluded"], round(time.monotonic() - started, 1)
    before = recorder.found.context["parts"].get(part.name, {}).get("excluded")
    entry = {"complete": lost in ({}, before), "seconds": seconds, "excluded": lost}
    recorder.found.context["parts"][part.name] = entry


def write_card(folder: Path, recorder: Recorder) -> None:
    """Writes the results and the page."""
    recorder.write()
    found = {name: recorder.found.part(name) for name in MODULES}
    reports = {name: MODULES[name].report(part) for name, part in found.items() if part.size}
    with writing(folder, "--output"):
        (folder / "card.md").write_text(card.markdown(recorder.found, reports))


if __name__ == "__main__":
    flags = f"output budget_minutes only model launches platform peers_python {launch.FORK}"
    raise SystemExit(launch.main(__doc__, measure, flags, launches=9))
