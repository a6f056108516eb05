"""Counts what one training step makes the device do, from a trace of the real step.

The traced program has no CUDA graphs, and larger gaps. What the host issues is therefore counted in
the list of thunks that XLA writes, as `DUMP` says, of a program with graphs, and of no other.
"""

import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

DUMP = "--xla_dump_to={} --xla_dump_hlo_module_re=.*train_steps.*"
CONTAINERS = ("while", "call", "conditional")  # their time is that of what they hold
COSTLIEST = 5
STEPS_ON_CPU = 10
# A kernel, or on a CPU a thunk: its HLO operation or its own name, start and end in ns.
Kernel = tuple[str, float, float]


def of_steps(
    train: Callable[..., Any], state: Any, steps: int, layers: Mapping[str, str], dump: Path | None
) -> dict[str, Any]:
    """What a step consists of, by the profiler; `dump` has XLA's lists of thunks, if not None."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(train(state, steps))
        [file] = Path(folder).rglob("*.xplane.pb")
        found = kernels(jax.profiler.ProfileData.from_file(str(file)).planes)
    lists = dump.glob("*thunk_sequence_after_thunk_passes.txt") if dump else ()
    issued = [issued_per_step(path.read_text()) for path in sorted(lists)]
    return summarize(found, steps, layers) | {"issued_per_step": issued[-1] if issued else None}


def kernels(planes: Iterable[Any]) -> list[Kernel]:
    """What ran on a GPU's streams or a TPU's cores or, on a CPU, the thunks."""
    every = [(plane.name, line) for plane in planes for line in plane.lines]
    on_device = [line for name, line in every if "/device:" in name]
    lines = [line for line in on_device if line.name.startswith("Stream")]  # a GPU's
    lines = lines or [line for line in on_device if line.name == "XLA Ops"]  # a TPU's
    found = []
    for event in (event for line in lines or [line for _, line in every] for event in line.events):
        name = dict(event.stats).get("hlo_op", event.name if lines else "")
        if lines or (name and name.partition(".")[0] not in CONTAINERS):
            found.append((name, event.start_ns, event.start_ns + event.duration_ns))
    return found


def layers_of(hlo: str, names: Sequence[str]) -> dict[str, str]:
    """The layer of each operation of a compiled program, by the name scopes in its metadata."""
    scopes = re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo)
    return {op: next((x for x in scope.split("/") if x in names), "") for op, scope in scopes}


def summarize(found: Sequence[Kernel], steps: int, layers: Mapping[str, str]) -> dict[str, Any]:
    """What a step consists of: kernels, gaps, the costliest operations, the layers' shares."""
    by_operation: dict[str, list[float]] = defaultdict(list)
    by_layer: dict[str, float] = defaultdict(float)
    total_ns = sum(end_ns - start_ns for _, start_ns, end_ns in found)
    for name, start_ns, end_ns in found:
        by_operation[name].append((end_ns - start_ns) / total_ns)
        by_layer[layers.get(name) or "other"] += (end_ns - start_ns) / total_ns
    times_ns = np.array(sorted(times for _, *times in found))
    starts_ns, ends_ns = times_ns[:, 0], np.maximum.accumulate(times_ns[:, 1])
    gaps_ns = np.maximum(0, starts_ns[1:] - ends_ns[:-1]).sum()  # when no kernel runs
    rows = []
    for name, shares in sorted(by_operation.items(), key=lambda item: -sum(item[1]))[:COSTLIEST]:
        counts = {"per_step": len(shares) / steps, "share": sum(shares)}
        rows.append({"operation": name, "layer": layers.get(name, ""), **counts})
    whole = {"steps": steps, "kernels_per_step": len(found) / steps}
    whole["gap_share"] = float(gaps_ns / (ends_ns[-1] - starts_ns[0]))
    return whole | {"costliest": rows, "layer_shares": by_layer}


def issued_per_step(thunks: str) -> int | None:
    """What the host issues in a turn of the loop over steps; a CUDA graph counts once."""
    body = thunks.partition("body:\n")[2].splitlines()
    indents = [len(line) - len(line.lstrip()) for line in body]
    inside = list(itertools.takewhile(lambda indent: indent >= indents[0], indents))
    return inside.count(indents[0]) if inside else None
