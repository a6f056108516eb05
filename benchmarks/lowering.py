"""Says for which platforms an epoch of training steps lowers (`jax.export`), from any machine."""

import argparse
import itertools
from typing import Any

import jax
import numpy as np
from jax import export

from benchmarks import launch, results
from benchmarks.results import Recorder, Results
from benchmarks.workers import ours
from benchmarks.workers.job import Job
from mnist_jax.data import Split
from mnist_jax.metrics import Metrics
from mnist_jax.parallel import mesh as meshes

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def lower(job: Job, platform: str) -> None:
    """Lowers an epoch; raises an error of any kind where that cannot be done."""
    mesh, where = meshes.make_mesh([meshes.select_device("cpu")]), PLATFORMS[platform]
    _, programs = ours.programs_of(job, mesh, where)
    key, shape, size = jax.random.key(0), jax.ShapeDtypeStruct, job.train_size
    count = size // job.batch_size if where != "cpu" else np.int32(size // job.batch_size)
    split: Any = Split(shape((size, *job.image_shape), np.uint8), shape((size,), np.int32))  # pyright: ignore
    state = jax.eval_shape(programs.init_state, key, {}, None, None)
    place = shape((size,), np.int32), key, np.int32(0), count
    export.export(programs.train_steps, platforms=[platform])(state, Metrics.zeros(), split, *place)


def run(models: list[str], **fields: Any) -> dict[str, Any]:
    """Lowers every network for every platform; returns the content of a result file."""
    rows, excluded = [], {}
    case = {name: fields[name] for name in ("batch_size", "precision")}
    for model, platform in itertools.product(models, PLATFORMS):
        try:
            lower(Job(model=model, **fields), platform)
            rows.append({"model": model, **case, "platform": platform})
        except Exception as error:  # any: there is no program for this platform
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            excluded[f"{model}, lowering for {platform}"] = why
    return {"context": {"excluded": excluded}, "benchmarks": [], "tables": {"lowering": rows}}


def measure(options: argparse.Namespace, recorder: Recorder) -> None:
    """Lowers in a process that leaves the accelerator to others."""
    fields = {"batch_size": options.batch_size[0], "precision": options.precision[0]}
    fields |= launch.random_images(options) | {"variables": {"JAX_PLATFORMS": "cpu"}}
    launch.measure(recorder, "benchmarks.lowering:run", "lowering", models=options.model, **fields)


def report(found: Results) -> list[str]:
    """The table."""
    rows = [[*map(str, row.values())][:4] for row in found.tables.get("lowering", [])]
    return [results.table("An epoch lowers for", ["model", "batch", "precision", "platform"], rows)]


if __name__ == "__main__":
    raise SystemExit(launch.main(__doc__, measure, f"{launch.ONE_CASE} {launch.FORK}", report))
