"""Saved runs: read back from their folders, and applied to images."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from mnist_jax import steps
from mnist_jax.atomic_io import user_path
from mnist_jax.compiled_steps import EVAL_BATCH_SIZE
from mnist_jax.compiler import COMPUTE_DTYPE, use_device
from mnist_jax.config import Config, member_label
from mnist_jax.data import DATASETS, Dataset, DataSpec, load_dataset
from mnist_jax.errors import DataError, NonFiniteError, UsageError
from mnist_jax.fork import BUILT_IN, keep_names
from mnist_jax.models import IMAGE_SHAPE, forward, make_model
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import load_saved, variables_of
from mnist_jax.runs.run_dir import CONFIG, read_config, read_result

PRETRAINED = Path(__file__).parents[1] / "pretrained"  # a run that comes with the package
CPU_BATCH_SIZE = 50  # small enough for the CNN's activations to stay in a CPU's cache


class LoadedRun(NamedTuple):
    """What a run's folder holds."""

    folder: Path
    config: Config  # resolved
    data: DataSpec
    model: nn.Module  # computes in the run's precision
    members: list[tuple[Any, Any]]  # parameters to evaluate and model state of each network
    step: int  # updates done
    rows: list[dict[str, Any]]  # the lines of metrics.jsonl
    seconds: dict[str, float]  # timings, as in result.json
    warnings: list[str]  # a damaged checkpoint that was skipped; that the run is not complete
    record: dict[str, Any] | None = None  # the content of result.json, if the run is complete

    def __repr__(self) -> str:
        networks = len(self.members)
        steps = f"{self.step:,} steps" + f" of {networks} networks" * (networks > 1)
        return f"<LoadedRun {self.folder}: {self.config.model} on {self.data.name}, {steps}>"

    def logits(self, member: tuple[Any, Any], image: jax.Array) -> jax.Array:
        """Logits (n, classes) float32 of one of the members; a pure function of both arguments.

        Images are (n, *image_shape), n ≥ 1: uint8, or float32 as the network sees them.
        """
        x = steps.to_input(image, normalize=self.config.normalize)
        return forward(self.model, *member, x)[0]

    def finite_member(self, place: int) -> tuple[Any, Any]:
        """One of the members; raises NonFiniteError if its arrays are not finite."""
        member = self.members[place]
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(member)):
            name = self.config.member_labels()[place]
            raise NonFiniteError(f"{name} of {self.folder} is not finite; choose another")
        return member

    def apply(self, image: jax.Array) -> jax.Array:
        """Log probabilities (n, classes) float32 of images as for `logits`; pure, for a teacher.

        Several members vote with the mean of their probabilities. Errors are those of
        `finite_member`.
        """
        members = map(self.finite_member, range(len(self.members)))
        found = [jax.nn.log_softmax(self.logits(member, image)) for member in members]
        return jax.nn.logsumexp(jnp.stack(found), axis=0) - math.log(len(found))


@keep_names()
def load_run(folder: str | Path | LoadedRun) -> LoadedRun:
    """Reads a run, complete or not; changes nothing in its folder. Runs its fork, if it has one.

    `predict` and `evaluate` also take what this returns; so a run is read once for many calls.

    Raises:
        UsageError: the folder holds no run.
        CheckpointError: its config or checkpoints cannot be used.
    """
    if isinstance(folder, LoadedRun):
        return folder
    folder = user_path(folder)
    config, data = read_config(folder)
    model = make_model(**config.model_arguments(data), dtype=COMPUTE_DTYPE[config.precision])
    arrays, rest, warnings = load_saved(folder)
    variables = variables_of(arrays, config, model)
    count = config.num_members
    members = [variables] if count is None else [member_of(variables, m) for m in range(count)]
    step = int(np.max(arrays["state/step"]))
    known = {field.name for field in dataclasses.fields(Config)} | {"version", "data"}
    if unknown := ", ".join(sorted(json.loads((folder / CONFIG).read_bytes()).keys() - known)):
        warnings.append(f"{folder} has settings that this version does not know: {unknown}")
    was_trained_here = any(name.startswith("state/opt_state/") for name in arrays)  # no `save_run`
    if (record := read_result(folder)) is None and was_trained_here:
        warnings.append(f"{folder} is not complete: it has done {step:,} steps")
    elif record and step != record["steps"]:
        warnings.append(f"{folder} has lost its last checkpoint: this one is of step {step:,}")
    rows, seconds = rest["rows"], (record or {}).get("timings", rest["seconds"])
    return LoadedRun(folder, config, data, model, members, step, rows, seconds, warnings, record)


@keep_names()
def dataset_of(
    run: LoadedRun,
    *,
    dataset: str | Dataset | None = None,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
) -> Dataset:
    """The data set of a run, or another one; errors are those of `load_dataset`."""
    config = run.config
    config.components()  # registers the names of its fork
    given = config.dataset if dataset is None else dataset
    name = given.name if isinstance(given, Dataset) else given
    is_own = name in (config.dataset, run.data.name)
    if not isinstance(dataset, Dataset):
        has_source = name in DATASETS and not (name in BUILT_IN["dataset"] and run.data.sha256)
        if is_own and not has_source and not Path(name).is_absolute():
            given = f"{run.folder} was trained on {name}, arrays that fit was given"
            raise UsageError(f"{given}; call mnist_jax.evaluate(RUN, dataset=…) with them")
        options = config.arguments("dataset") if is_own else {}
        data_dir = config.data_dir if data_dir is None else data_dir
        dataset = load_dataset(name, data_dir=data_dir, manual_dir=manual_dir, **options)
    spec, own = dataset.spec, run.data
    if (spec.image_shape, spec.num_classes) != (own.image_shape, own.num_classes):
        found, needed = (f"{list(s.image_shape)} in {s.num_classes} classes" for s in (spec, own))
        raise UsageError(f"{dataset.name} has images {found}; {run.folder} is for {needed}")
    if is_own and (spec.sha256 != own.sha256 or not dataset.has_its_arrays):
        raise DataError(f"the data {name} have changed since the run {run.folder} began")
    return dataset


class Prediction(NamedTuple):
    """The answers of a run's members to images."""

    log_probabilities: np.ndarray  # (members, n, classes) float64
    members: list[dict[str, Any]]  # what distinguishes these, as `Config.members`
    warnings: list[str]  # members that are excluded because their outputs are not finite

    @property
    def mean(self) -> np.ndarray:
        """(n, classes) float64: the mean of the members' probabilities."""
        return np.exp(self.log_probabilities).mean(0)


class Predictor:
    """A run's members, compiled for a device. Any thread may call it.

    platform: of the device; None for the run's own. Raises DeviceError if it is absent.
    """

    def __init__(self, run: LoadedRun, platform: str | None = None):
        self._run = run
        self._platform = (run.config if platform is None else Config(platform=platform)).platform
        self._logits = jax.jit(run.logits)
        with use_device(self._platform, run.config.precision) as device:
            self._members = jax.device_put(run.members, device)
            self._batch_size = CPU_BATCH_SIZE if device.platform == "cpu" else EVAL_BATCH_SIZE

    def __call__(self, images: np.ndarray) -> Prediction:
        """The members' answers to images (n, *image_shape) uint8, n ≥ 1.

        Raises:
            UsageError: `images` is something else.
            NonFiniteError: the outputs of every member are NaN or infinite.
        """
        run, members, found, warnings = self._run, [], [], []
        shape = run.data.image_shape
        if images.shape[1:] != shape or not images.size or images.dtype != np.uint8:
            needed = f"uint8 0 to 255, (n, {', '.join(map(str, shape))}) with n of 1 or more"
            given = f"the images are {images.dtype} {images.shape}; {run.folder} takes {needed}"
            is_picture = images.shape[1:] == IMAGE_SHAPE != shape
            hint = "; pictures cannot be that: call predict(RUN, array) in Python" * is_picture
            raise UsageError(given + hint)
        size = min(self._batch_size, len(images))
        padding = -len(images) % size  # one shape, one program
        batches = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        batches = batches.reshape(-1, size, *shape)
        with use_device(self._platform, run.config.precision) as device:
            for member, variables in zip(run.config.members(), self._members, strict=True):
                on_device = (jax.device_put(batch, device) for batch in batches)
                logits = jax.device_get([self._logits(variables, batch) for batch in on_device])
                logits = np.concatenate(logits)[: len(images)].astype(np.float64)
                if np.all(np.isfinite(logits)):
                    members.append(member)
                    found.append(scipy.special.log_softmax(logits, axis=1))
                else:
                    name = member_label(member)
                    warnings.append(f"{name} of {run.folder} is not finite; it is excluded")
        if not found:
            raise NonFiniteError(f"{'; '.join(warnings)}; no network is left")
        return Prediction(np.stack(found), members, warnings)
