"""Counts what one training step makes the device do, from a trace of the real step.

`benchmarks.step --trace` runs it in a process of its own, because XLA writes its list of thunks
(what the host issues) only if a flag says so before the device is opened.

While a trace is taken XLA launches every kernel by itself, without CUDA graphs: times and numbers
of kernels are those of the step, the gaps between them are larger. What the host issues is
therefore counted in the list of thunks.
"""

import gzip
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold
COSTLIEST = 5
STEPS_ON_CPU, STEPS = 10, 100

Event = dict[str, Any]


def kernels(events: Sequence[Event]) -> list[Event]:
    """The events of kernels: those on a device's streams or, on a CPU, the thunks."""
    named = {
        (e["name"], e["pid"], e.get("tid")): str(e["args"]["name"])
        for e in events
        if e.get("ph") == "M" and "name" in e.get("args", {})
    }
    devices = {
        pid
        for (kind, pid, _), name in named.items()
        if kind == "process_name" and "/device:" in name
    }
    lines = {"Stream": set(), "XLA Ops": set()}  # a GPU's, a TPU's
    for (kind, pid, tid), name in named.items():
        for start, places in lines.items():
            if kind == "thread_name" and pid in devices and name.startswith(start):
                places.add((pid, tid))
    places = lines["Stream"] or lines["XLA Ops"]
    complete = [e for e in events if e.get("ph") == "X"]
    if places:
        return [e for e in complete if (e["pid"], e["tid"]) in places]
    thunks = [e for e in complete if "hlo_op" in e.get("args", {})]
    return [e for e in thunks if operation(e).partition(".")[0] not in CONTAINERS]


def operation(event: Event) -> str:
    """The HLO operation that an event belongs to, or the kernel's own name."""
    return event.get("args", {}).get("hlo_op", event["name"])


def busy_us(events: Sequence[Event]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        until = event["ts"] + event["dur"]
        total += max(0.0, until - max(event["ts"], end))
        end = max(end, until)
    return total


def layers_of(hlo: str, names: Sequence[str]) -> dict[str, str]:
    """The layer of each operation of a compiled program, by the name scopes in its metadata."""
    scopes = re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo)
    return {
        name: next((layer for layer in names if layer in scope.split("/")), "")
        for name, scope in scopes
    }


def summarize(events: Sequence[Event], steps: int, layers: dict[str, str]) -> dict[str, Any]:
    """What a step consists of: kernels, gaps, the costliest operations, the layers' shares."""
    found = kernels(events)
    by_operation: dict[str, list[float]] = defaultdict(list)
    by_layer: dict[str, float] = defaultdict(float)
    whole = sum(event["dur"] for event in found) or 1.0
    for event in found:
        by_operation[operation(event)].append(event["dur"] / whole)
        by_layer[layers.get(operation(event)) or "other"] += event["dur"] / whole
    span = max(e["ts"] + e["dur"] for e in found) - min(e["ts"] for e in found)
    costliest = sorted(by_operation.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]
    return {
        "steps": steps,
        "kernels_per_step": len(found) / steps,
        "gap_share": 1 - busy_us(found) / span,
        "costliest": [
            {
                "operation": name,
                "layer": layers.get(name, ""),
                "per_step": len(shares) / steps,
                "share": sum(shares),
            }
            for name, shares in costliest
        ],
        "layer_shares": by_layer,
    }


def issued_per_step(thunks: str) -> int | None:
    """What the host issues for a turn of the loop over steps, in XLA's list of thunks.

    A command buffer (CUDA graph) counts once. None if the list holds no loop.
    """
    lines = [(len(line) - len(line.lstrip()), line) for line in thunks.splitlines()]
    begin = next(
        (i for i, (_, line) in enumerate(lines) if line.lstrip().startswith("body:")), None
    )
    if begin is None:
        return None
    indents = [indent for indent, _ in lines[begin + 1 :]]
    end = next((i for i, indent in enumerate(indents) if indent <= lines[begin][0]), len(indents))
    return indents[:end].count(indents[0])


def main(question: dict[str, Any]) -> dict[str, Any]:
    """Runs the job's training step under the profiler; returns its row of the table "trace"."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dump = f"--xla_dump_to={folder}/dump --xla_dump_hlo_module_re=.*train_steps.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
        import jax

        from benchmarks.workers import job as jobs
        from benchmarks.workers import ours
        from mnist_jax.models import MODELS, layers
        from mnist_jax.parallel import mesh

        traced = Path(question.pop("folder") or folder / "trace")
        job = jobs.Job(**question | {"steps_per_call": STEPS, "what": ("train",)})
        with jax.default_matmul_precision(mesh.MATMUL_PRECISION[job.precision]):
            workload = ours.make(job, jobs.make_data(job))
            steps = STEPS_ON_CPU if workload.unit == 1 else workload.unit
            state = jax.block_until_ready(workload.train(workload.state, steps))
            with jax.profiler.trace(traced):
                jax.block_until_ready(workload.train(state, steps))
        newest = max(traced.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
        with gzip.open(newest) as file:
            events = json.load(file)["traceEvents"]
        names = [layer.name for layer in layers(MODELS[job.model]())]
        row = summarize(events, steps, layers_of(workload.program.as_text(), names))
        lists = sorted((folder / "dump").glob("*thunk_sequence_after_thunk_passes.txt"))
        issued = issued_per_step(lists[-1].read_text()) if lists else None
    case = {"model": job.model, "batch_size": job.batch_size, "precision": job.precision}
    return case | row | {"issued_per_step": issued}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
