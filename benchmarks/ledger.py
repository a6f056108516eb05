"""Says where the wall time of `train.py` goes, with and without compiled programs at hand.

Each network is trained twice: cold, with an empty cache of compiled programs, and warm. Parts are
those of result.json; "between" is the run's other time, such as checkpoints; "start, exit" is the
process around the run. Without tyro, `fit` starts the same run.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import launch, results
from benchmarks.results import Recorder, Results

MEASURED = ("import", "data", "compile", "train", "eval")
EPOCHS = 3
PARTS = (*MEASURED, "between", "start, exit")
FIT = """
import json, sys, time
started = time.perf_counter()
from mnist_jax import Config, fit
fit(Config(**json.loads(sys.argv[1])), callbacks=(), import_s=time.perf_counter() - started)
"""


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Trains every network cold and warm."""
    given = launch.flags_of_data(options) | {"epochs": EPOCHS, "platform": options.platform}
    given |= {"batch_size": options.batch_size[0], "precision": options.precision[0]}
    for model in options.model:
        with tempfile.TemporaryDirectory() as folder:
            try:
                for cache in ("cold", "warm"):
                    place = {"model": model, "workdir": f"{folder}/{cache}"}
                    row = train(recorder, given | place, launch.shared_cache(folder))
                    recorder.row("ledger", model=f"{model}, {given['dataset']}", cache=cache, **row)
            except launch.ProcessError as error:
                recorder.exclude(f"{model}, train.py", str(error))


def train(recorder: Recorder, options: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """Trains with these options; returns the seconds of the parts and of the process."""
    command = [sys.executable, "train.py"]
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if importlib.util.find_spec("tyro") is None:
        command = [sys.executable, "-c", FIT, json.dumps(options)]
    _, wall_s = launch.run(command, variables, timeout_s=recorder.left_s())
    timings = json.loads((Path(options["workdir"]) / "result.json").read_text())["timings"]
    seconds = {part: timings[f"{part}_s"] for part in MEASURED}
    seconds["between"] = timings["total_s"] - sum(seconds.values())
    seconds["start, exit"] = wall_s - timings["total_s"]
    return {"seconds": seconds, "wall_s": wall_s}


def summary(row: dict[str, Any]) -> str:
    """What a row says in a line."""
    parts = sorted(row["seconds"].items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{part} {s / row['wall_s']:.0%}" for part, s in parts)
    return f"{row['model']}, {EPOCHS} epochs, {row['cache']}: {row['wall_s']:.3g} s ({shares})"


def report(found: Results) -> list[str]:
    """The table."""
    rows = []
    for row in found.tables.get("ledger", []):
        seconds = [*(row["seconds"][part] for part in PARTS), row["wall_s"]]
        rows.append([row["model"], row["cache"], *(f"{s:.2f}" for s in seconds)])
    headings = ["model", "compiled programs", *PARTS, "wall"]
    return [results.table(f"Wall time of train.py, {EPOCHS} epochs, seconds", headings, rows)]


if __name__ == "__main__":
    raise SystemExit(launch.main(__doc__, measure, f"{launch.ONE_CASE} {launch.FORK}", report))
