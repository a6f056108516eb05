"""Exports a saved model for other programs: its parameters, or a StableHLO program."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export

from mnist_jax import atomic_io, models
from mnist_jax.compiler import MATMUL_PRECISION
from mnist_jax.errors import UsageError, first_line, writing
from mnist_jax.inference.flags import RunFolder, open_runs
from mnist_jax.inference.restore import LoadedRun
from mnist_jax.runs.checkpoint import flatten
from mnist_jax.runs.statistics import percent

PLATFORMS = ("cpu", "cuda", "tpu")  # a StableHLO program runs on each
Format = Literal["safetensors", "stablehlo"]
CONVENTIONS = (
    "images (b, height, width, channels); convolution kernels (height, width, in, out), stride 1, "
    "padding SAME if none is named; pooling is the maximum of 2×2 pixels; gelu by tanh; no dropout"
)


def export(
    run: LoadedRun, file_format: Format, output: Path, member: int | None = None
) -> dict[str, Any]:
    """Writes a saved model to `output` and its description to `<output>.json`; returns the latter.

    member: number of the network, from 0, needed if the run has several.

    Raises:
        UsageError: there is no such member.
        NonFiniteError: the parameters are not finite.
        DeviceError: a file cannot be written.
    """
    config, names = run.config, run.config.member_labels()
    place = 0 if member is None and len(names) == 1 else member
    if place is None or not 0 <= place < len(names):
        which = " to ".join(f"{i} ({names[i]})" for i in sorted({0, len(names) - 1}))
        given = "" if member is None else f"member is {member}; "
        raise UsageError(f"{given}the networks are {which}; choose with --member")
    params, model_state = run.finite_member(place)
    if file_format == "stablehlo":
        data, content = _to_stablehlo(run, place), "probabilities"
    else:
        data = safetensors.numpy.save(flatten(params) | flatten(model_state))
        scaled = " / 255" if config.normalize else ""
        content = f"logits of float32 images{scaled}; apply softmax"
    code = None  # of the model's class, to rebuild it from; a class may be in no file
    with contextlib.suppress(OSError, TypeError):
        code = inspect.getsource(type(run.model))
    rows = [row for row in run.rows if row["step"] == run.step]
    accuracy = float(np.atleast_1d(rows[-1]["test/accuracy"])[place]) if rows else None
    description = {
        "version": 1,
        "format": file_format,
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {"shape": ["b", *run.data.image_shape], "dtype": "uint8"},
        "output": {"shape": ["b", run.data.num_classes], "dtype": "float32", "content": content},
        "classes": run.data.class_names,
        "code": code,
        "conventions": CONVENTIONS if type(run.model).__module__ == models.__name__ else None,
        **config.members()[place],
        "step": run.step,
        "test_accuracy": accuracy,
        # Without paths of this machine.
        "config": config.hyperparameters() | {"dataset": run.data.name, "init_from": None},
        "jax": jax.__version__,
    }
    text = json.dumps(description, indent=1) + "\n"
    with writing(output, "--output"):
        atomic_io.write_atomically(output, data)
        atomic_io.write_atomically(Path(f"{output}.json"), text.encode())
    return description


def _to_stablehlo(run: LoadedRun, place: int) -> bytes:
    """A program that holds the parameters of a member, to be read by `jax.export.deserialize`.

    (b, *image_shape) uint8 → probabilities (b, classes) float32, in the run's precision.
    """
    shape = *jax_export.symbolic_shape("b"), *run.data.image_shape
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    program = jax.jit(lambda image: jax.nn.softmax(run.logits(run.members[place], image)))
    # Without source locations, which would put this machine's paths into the file.
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        with jax.default_matmul_precision(MATMUL_PRECISION[run.config.precision]):
            return bytes(jax_export.export(program, platforms=PLATFORMS)(images).serialize())
    except TypeError as error:
        problem = f"the model is for a fixed number of images ({first_line(error)})"
        raise UsageError(f"{problem}; write x.shape[0] in place of len(x)") from error
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
    """Number of the network to export, from 0, in a run that has several."""

    def run(self) -> None:
        """Prints what was written, and the network's test accuracy."""
        (run,) = open_runs([self.folder])
        output = atomic_io.user_path(self.output or run.folder / f"model.{self.format}")
        found = export(run, self.format, output, self.member)
        print(f"{output}  {output.stat().st_size:,} bytes, described in {output.name}.json")
        name = run.config.member_labels()[self.member or 0]
        which = f"{run.config.model} on {run.data.name}, {name}"
        print(f"{which}, test accuracy {percent(found['test_accuracy'])}")
