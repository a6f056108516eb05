"""Exports a saved model for other programs: its parameters, or a StableHLO program."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from mnist_jax import atomic_io
from mnist_jax.data import class_names
from mnist_jax.errors import DeviceError, NonFiniteError, UsageError
from mnist_jax.inference.flags import RunFolder, print_warnings
from mnist_jax.inference.restore import LoadedRun, load_run, logits_fn
from mnist_jax.models import IMAGE_SHAPE
from mnist_jax.parallel import mesh
from mnist_jax.runs.checkpoint import names_of
from mnist_jax.runs.statistics import percent

PLATFORMS = ("cpu", "cuda", "tpu")  # a StableHLO program runs on each
Format = Literal["safetensors", "stablehlo"]


def export(
    run: LoadedRun, file_format: Format, output: Path, member: int | None = None
) -> dict[str, Any]:
    """Writes a saved model to `output` and its description to `<output>.json`; returns the latter.

    member: seed of the network, needed if the run has several.

    Raises:
        UsageError: there is no such member.
        NonFiniteError: the parameters are not finite.
        DeviceError: a file cannot be written.
    """
    config, seeds = run.config, run.config.all_seeds()
    seed = seeds[0] if member is None and len(seeds) == 1 else member
    if seed is None or seed not in seeds:
        which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        raise UsageError(f"member is {member}; the run has {which}; choose one with --member")
    place = seeds.index(seed)
    params = run.members[place]
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
        raise NonFiniteError(f"seed {seed} of {run.folder} is not finite; export another")
    if file_format == "stablehlo":
        data, content = to_stablehlo(run, params), "probabilities"
    else:
        data, scaled = safetensors.numpy.save(names_of(params)), " / 255" * config.normalize
        content = f"logits of float32 images{scaled}; apply softmax"
    classes = class_names(config.dataset)
    rows = [row for row in run.rows if row["step"] == run.step]
    accuracy = float(np.atleast_1d(rows[-1]["test/accuracy"])[place]) if rows else None
    description = {
        "version": 1,
        "format": file_format,
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {"shape": ["b", *IMAGE_SHAPE], "dtype": "uint8", "content": "light on black"},
        "output": {"shape": ["b", len(classes)], "dtype": "float32", "content": content},
        "classes": classes,
        "seed": seed,
        "step": run.step,
        "test_accuracy": accuracy,
        "config": config.hyperparameters(),  # without fields that hold paths
        "jax": jax.__version__,
    }
    text = json.dumps(description, indent=1) + "\n"
    try:
        atomic_io.write_atomically(output, data)
        atomic_io.write_atomically(Path(f"{output}.json"), text.encode())
    except OSError as error:
        raise DeviceError(f"cannot write {output}; choose another --output ({error})") from error
    return description


def to_stablehlo(run: LoadedRun, params: Any) -> bytes:
    """A program that holds the parameters, to be read by `jax.export.deserialize`.

    (b, 28, 28, 1) uint8 → probabilities (b, classes) float32, in the run's precision.
    """
    logits = logits_fn(run)
    images = jax.ShapeDtypeStruct((*jax_export.symbolic_shape("b"), *IMAGE_SHAPE), jnp.uint8)
    program = jax.jit(lambda image: jax.nn.softmax(logits(params, image)))
    # Without source locations, which would put this machine's paths into the file.
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        with jax.default_matmul_precision(mesh.MATMUL_PRECISION[run.config.precision]):
            return bytes(jax_export.export(program, platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update(option, before)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Exports a saved model for other programs, with a description in <file>.json."""

    folder: RunFolder
    """The run's folder."""

    format: Format = "safetensors"
    """safetensors: the parameters by name. stablehlo: a program from pixels to probabilities for
    CPU, NVIDIA GPU and TPU, which jax.export reads without this package, if that JAX is at most 6
    months newer, or 3 weeks older, than the one here."""

    output: Path | None = None
    """The file. None: model.<format> in the run's folder."""

    member: int | None = None
    """Seed of the network to export, from a run with --seeds=K."""

    def run(self) -> None:
        """Prints what was written, and the network's test accuracy."""
        run = load_run(self.folder)
        output = atomic_io.user_path(self.output or run.folder / f"model.{self.format}")
        found = export(run, self.format, output, self.member)
        print_warnings(run.warnings)
        print(f"{output}  {output.stat().st_size:,} bytes, described in {output.name}.json")
        which = f"{run.config.model} on {run.config.dataset}, seed {found['seed']}"
        print(f"{which}, test accuracy {percent(found['test_accuracy'])}")
