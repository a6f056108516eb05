"""Checkpoints: all that a run needs to resume to the same bits, one safetensors file each.

    checkpoints/epoch-0001-step-00000600.safetensors          arrays; the rest as JSON metadata
    checkpoints/epoch-0001-step-00000600.safetensors.sha256   digest, for `sha256sum --check`

A file is written under a temporary name, synced and renamed (`atomic_io`), so it is complete or
absent; its digest detects damage. Loading a file runs no code.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy

from mnist_jax import atomic_io
from mnist_jax.config import FORMAT_VERSION, Config
from mnist_jax.errors import CheckpointError, writing
from mnist_jax.metrics import Metrics
from mnist_jax.models import variable_shapes
from mnist_jax.optimizer import ema_params
from mnist_jax.steps import TrainState

KEPT = 3  # newest checkpoints; older ones are removed


@dataclasses.dataclass
class Progress:
    """How far a run is: the content of a checkpoint."""

    state: TrainState
    metrics: Metrics  # of the current epoch so far
    epoch: int = 0  # completed
    batch: int = 0  # updates of the current epoch
    train_s: float = 0.0  # seconds they took
    # The lines of metrics.jsonl, and the accuracies and counts of the last evaluation.
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Timings, summed over the processes that worked on the run one after another; in a running one
    # those of earlier processes.
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """Updates done."""
        return (self.rows[-1]["step"] if self.rows else 0) + self.batch


def flatten(tree: Any) -> dict[str, Any]:
    """The tree's leaves by their paths, such as "state/params/dense1/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(template: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A tree like `template` (arrays, or their shapes and dtypes) with `arrays` of these names.

    Raises CheckpointError if an array is missing, or has another shape or dtype.
    """
    leaves = []
    for name, leaf in flatten(template).items():
        if name not in arrays:
            raise CheckpointError(f"the checkpoint has no array {name}")
        found = arrays[name]
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            kinds = f"{found.dtype}{list(found.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            raise CheckpointError(f"the checkpoint's {name} is {kinds}")
        leaves.append(found)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def load_saved(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The newest intact checkpoint in a run's folder.

    Returns the arrays by name, the metadata of `Progress`, and a warning for each damaged file.

    Raises CheckpointError if there is none.
    """
    damaged = []
    for path in _paths(folder / "checkpoints"):
        try:
            data = atomic_io.read_verified(path)
            with safetensors.safe_open(path, "numpy") as file:
                rest = json.loads(file.metadata()["rest"])
        except (atomic_io.IntegrityError, OSError) as error:
            damaged.append(f"the checkpoint {path} is damaged ({error})")
            continue
        warnings = [f"{problem}; {path.name} is used instead" for problem in damaged]
        return safetensors.numpy.load(data), rest, warnings
    never = f"{folder} holds no checkpoint; if it never had one, repeat its training command; else"
    problem = f"{'; '.join(damaged)};" if damaged else never
    raise CheckpointError(f"{problem} restore one, or train again in another --workdir")


def stacked_shapes(config: Config, model: nn.Module) -> tuple[Any, Any]:
    """Shapes and dtypes of the parameters and the model state, stacked by member if there are."""
    shapes, members = variable_shapes(model), config.num_members
    axes = () if members is None else (members,)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), shapes)


def variables_of(
    arrays: dict[str, np.ndarray], config: Config, model: nn.Module
) -> tuple[Any, Any]:
    """The parameters to evaluate (their EMA if the run keeps one) and the model state of a run.

    NumPy arrays, stacked by member if the run has members, from those of `load_saved`; the
    optimizer's state is not read.

    Raises CheckpointError if the arrays are of another model.
    """
    params, model_state = stacked_shapes(config, model)
    kind = "ema" if config.ema_decay and np.any(arrays["state/step"]) else "params"
    template = {"state": {kind: params, "model_state": model_state}}
    parts, names = (f"state/{kind}/", "state/model_state/"), flatten(template)
    if other := [n for n in arrays if n.startswith(parts) and n not in names]:
        raise CheckpointError(f"the model has no array {other[0].removeprefix('state/')}")
    state = unflatten(template, arrays)["state"]
    if kind == "params":  # also before the first step, when the EMA is zero
        return state["params"], state["model_state"]
    with jax.ensure_compile_time_eval():  # a loss may load its teacher while JAX traces it
        params = ema_params(*jax.device_put((state["ema"], arrays["state/step"])), config.ema_decay)
    return jax.device_get(params), state["model_state"]


def _paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = folder.glob("epoch-*-step-*.safetensors")
    return sorted(paths, key=lambda path: list(map(int, re.findall(r"\d+", path.name))))[::-1]


class CheckpointManager:
    """Saves checkpoints in a background thread, one at a time. Close it at the end.

    The next call of `save` or `wait_until_finished` raises DeviceError if a write failed.
    """

    def __init__(self, folder: Path, every_s: float):
        self.folder, self.every_s = folder, every_s
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last save began `every_s` seconds ago or earlier."""
        return time.monotonic() - self._saved_at >= self.every_s

    def is_saving(self) -> bool:
        """Whether a save is still in progress; False with `every_s` 0, where none is skipped."""
        return self.every_s > 0 and self._pending is not None and not self._pending.done()

    def save(self, progress: Progress) -> None:
        """Waits for the previous save, copies the arrays (NumPy's), and starts to write them."""
        self.wait_until_finished()
        rest = dict(vars(progress))
        tree = {name: rest.pop(name) for name in ("state", "metrics")}
        # Copies: on a CPU `device_get` may give views of buffers that the next step reuses.
        arrays = {name: np.array(leaf, order="C") for name, leaf in flatten(tree).items()}
        metadata = {"format": str(FORMAT_VERSION), "rest": json.dumps(rest)}
        name = f"epoch-{progress.epoch:04d}-step-{progress.step:08d}.safetensors"
        self._pending = self._writer.submit(self._write, self.folder / name, arrays, metadata)
        self._saved_at = time.monotonic()

    def wait_until_finished(self) -> None:
        """Returns once the last save is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with writing(f"the run's folder {self.folder.parent}", "--workdir"):
                pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        self._writer.shutdown(wait=True)

    def _write(self, path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        atomic_io.make_folder(self.folder, exist_ok=True)
        # The name determines the arrays. A crash while an intact checkpoint is replaced would leave
        # the new digest beside the old file.
        with contextlib.suppress(OSError, atomic_io.IntegrityError):
            atomic_io.read_verified(path)
            return
        atomic_io.write_verified(path, safetensors.numpy.save(arrays, metadata))
        for old in _paths(self.folder)[KEPT:]:
            old.unlink(missing_ok=True)  # the file first, so that none is without its digest
            atomic_io.digest_path(old).unlink(missing_ok=True)
