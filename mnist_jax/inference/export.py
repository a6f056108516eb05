"""A saved model for other programs: its parameters, or a program that holds them.

Beside either file lies its description, `<file>.json`: what goes in and comes out, the classes,
the accuracy, the config, and the SHA-256 of the file. It is written first, so no file is ever
without one; a file without one was not exported, and is never replaced.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax import atomic_io as storage
from mnist_jax.data import class_names
from mnist_jax.data.split import NUM_CLASSES
from mnist_jax.errors import DeviceError, NonFiniteError, UsageError
from mnist_jax.inference.restore import LoadedRun, classify, notice_incomplete
from mnist_jax.models import IMAGE_SHAPE, count_parameters
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs import run_dir as runs
from mnist_jax.runs.checkpoint import names_of

VERSION = 1  # of the description
FORMATS = ("safetensors", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")  # that a program is exported for


def export(
    run: LoadedRun, file_format: str, output: Path, member: int | None = None
) -> dict[str, Any]:
    """Writes a saved model, of an ensemble one member, to `output`, and its description beside it.

    Args:
        run: the model.
        file_format: one of `FORMATS`.
        output: a new file, or one that an earlier export left, which is replaced.
        member: the seed of a member; None where there is only one.

    Returns:
        The description. A notice is left in `run.notices` where its accuracy is not known.

    Raises:
        UsageError: there is no such member, or it is not said which; `output` is another's file.
        CheckpointError: the run's result is damaged.
        NonFiniteError: the parameters are not finite.
        DeviceError: a file cannot be written.
    """
    place = _place(run, member)
    params = jax.device_get(run.members[place])
    if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
        seed = run.config.all_seeds()[place]
        raise NonFiniteError(f"seed {seed} of {run.folder} is not finite; export another run")
    data = safetensors(params) if file_format == "safetensors" else stablehlo(run, params)
    digest = hashlib.sha256(data).hexdigest()
    description = {
        "version": VERSION,
        "format": file_format,
        "file": output.name,
        "sha256": digest,
        **_contract(run, file_format),
        **_origin(run, place),
        "parameters": count_parameters(params),
        "jax": jax.__version__,
    }
    _write(output, data, description)
    return description


def safetensors(params: Any) -> bytes:
    """The parameters as a safetensors file, with names such as "conv1/kernel"."""
    import safetensors.numpy

    named = names_of(params)
    return safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in named.items()})


def stablehlo(run: LoadedRun, params: Any) -> bytes:
    """The network as a file that `jax.export.deserialize` reads, for any number of images.

    (b, 28, 28, 1) uint8 → probabilities (b, classes) float32, scaled and multiplied as in the run,
    on each of `PLATFORMS`. The parameters are in it: one file is all that has to be kept together.
    """
    from jax import export

    def probabilities(image: jax.Array) -> jax.Array:
        return classify(run, params, image)

    images = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *IMAGE_SHAPE), jnp.uint8)
    precision = devices.MATMUL_PRECISION[run.config.precision]
    with jax.default_matmul_precision(precision), _no_source_paths():
        exported = export.export(jax.jit(probabilities), platforms=PLATFORMS)(images)
        return bytes(exported.serialize())


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """Operations do not name the lines that made them, whose paths may name the user."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


def _place(run: LoadedRun, member: int | None) -> int:
    """Where the member of that seed stands."""
    seeds = run.config.all_seeds()
    which = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    if member is None and len(seeds) > 1:
        raise UsageError(
            f"{run.folder} holds {len(seeds)} networks, of the seeds {which}; "
            "name one of them with --member"
        )
    if member is None:
        return 0
    if member not in seeds:
        raise UsageError(f"member is {member}; allowed is {which}, the run's seed; change --member")
    return seeds.index(member)


def _contract(run: LoadedRun, file_format: str) -> dict[str, Any]:
    """What goes in and comes out."""
    scale = "divided by 255" if run.config.normalize else "as they are"
    ready = file_format == "stablehlo"
    content = "a light figure on black, 0 to 255"
    if not ready:
        content += f"; the network takes them as float32, {scale}"
    return {
        "input": {"shape": ["b", *IMAGE_SHAPE], "dtype": "uint8", "content": content},
        "output": {
            "shape": ["b", NUM_CLASSES],
            "dtype": "float32",
            "content": "probabilities" if ready else "logits; their softmax is the probabilities",
        },
        **({"platforms": PLATFORMS} if ready else {}),
    }


def _origin(run: LoadedRun, place: int) -> dict[str, Any]:
    """What the run was, and how good this network is."""
    config = run.config
    return {
        "classes": class_names(config.dataset),
        "seed": config.all_seeds()[place],
        "epochs": run.progress.epoch,
        "steps": run.progress.step,
        **_accuracy(run, place),
        "config": config.hyperparameters(),  # without the fields that hold paths
    }


def _accuracy(run: LoadedRun, place: int) -> dict[str, Any]:
    """The test accuracy that result.json has for just these parameters; None where it has none."""
    unknown = {"test_accuracy": None, "test_correct": None, "test_count": None}
    record = runs.read_result(run.folder)
    if record is None:
        notice_incomplete(run)
        return unknown
    names = ("test_accuracy", "test_correct", "params_sha256")
    found, params = {name: record.get(name) for name in names}, run.progress.state.params
    if run.config.seeds is not None:
        params = member_of(params, place)
        found = {
            name: values[place] if isinstance(values, list) and place < len(values) else None
            for name, values in found.items()
        }
    if found.pop("params_sha256") != runs.params_sha256(params):
        result = run.folder / runs.RESULT
        run.notices.append(f"the accuracy in {result} is of other parameters; it is left out")
        return unknown
    return {**found, "test_count": record.get("test_count")}


def _write(output: Path, data: bytes, description: dict[str, Any]) -> None:
    beside = Path(f"{output}.json")
    try:
        if not _is_free(output, beside):
            raise UsageError(
                f"{output} or {beside} is there and was not exported; choose another --output"
            )
        storage.write_atomically(beside, (json.dumps(description, indent=1) + "\n").encode())
        storage.write_atomically(output, data)
    except OSError as error:
        raise DeviceError(
            f"cannot write {output} ({error.strerror}); choose another --output"
        ) from error


def _is_free(output: Path, beside: Path) -> bool:
    """Whether nothing is there but what an earlier export left."""
    if not beside.exists():
        return not output.exists()
    try:
        return storage.read_json(beside).get("file") == output.name
    except storage.IntegrityError:
        return False
