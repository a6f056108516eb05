"""Run by test_mesh.py in a process with eight CPU devices; prints what it finds as JSON.

Arguments: models whose training is examined, "runs" for calls of `fit`, "arrays" for one
Trainer with arrays of several shardings and dtypes.
"""

import contextlib
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small
from shared import StopAfter

from mnist_jax.compiled_steps import Trainer
from mnist_jax.compiler import use_device
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.errors import InterruptedRunError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.parallel.mesh import make_mesh, sharded, to_host
from mnist_jax.training import fit

SPLIT = small.make_split(300, seed=0)
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
# 36 images on 8 devices: 4 rows of padding.
SAME: dict[str, Any] = {"hidden_sizes": (16,), "shift": 2.0, "batch_size": 36, "steps_per_call": 9}
CONFIGS = {
    "mlp": Config(model="mlp", dropout=0.3, ema_decay=0.9, **SAME),
    "cnn": Config(model="cnn", **SAME),
}
RUN = {"model": "logistic", "dataset": "digits", "epochs": 2, "steps_per_call": 5}


def largest_difference(tree: Any, reference: Any) -> float:
    """Of all leaves, relative to the largest number of the leaf."""
    pairs = zip(*map(jax.tree.leaves, (tree, reference)), strict=True)
    return float(max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs))


def trainer_of(config: Config, count: int) -> Trainer:
    config, mesh = config.resolve(), make_mesh(jax.devices()[:count])
    dataset = Dataset("mnist", SPLIT, SPLIT, "", (), ())
    model = MODELS[config.model](**config.arguments("model"))
    return Trainer(model, dataset, config, mesh)


def cast(tree: Any, dtype: Any) -> Any:
    is_float = partial(np.issubdtype, arg2=np.floating)
    return jax.tree.map(lambda x: np.asarray(x, dtype if is_float(x.dtype) else None), tree)


def train(trainer: Trainer, dtype: Any, epochs: int, batches: int) -> tuple[Any, Metrics]:
    """The state after so many epochs of so many batches, and the metrics of the last."""
    state, zeros = cast((to_host(trainer.init()), Metrics.zeros()), dtype)
    state, metrics = trainer.put_state(state), zeros
    for epoch in range(epochs):
        state, metrics, *_ = trainer.train(state, zeros, trainer.permutation(epoch), 0, batches)
    return to_host(state), metrics


def collectives(trainer: Trainer) -> dict[str, list[int]]:
    """For each collective operation of a step, its numbers of floating-point operands."""
    train_steps = trainer._steps.train_steps
    [program] = [found for key, found in trainer._compiled.items() if key[0] is train_steps]
    found: dict[str, list[int]] = {}
    for types, name in re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", program.as_text()):
        found.setdefault(name, []).append(len(re.findall(r"f\d\d\[", types)))
    return {name: sorted(numbers) for name, numbers in found.items()}


def gradients(state: Any) -> list[np.ndarray]:
    """Of the first batch: Adam's first moment after one step is proportional to them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]


def examine(name: str) -> dict[str, Any]:
    """One device against eight: collectives, float64 states; of the CNN, float32 gradients."""
    is_cnn = name == "cnn"
    with jax.enable_x64(not is_cnn):
        dtype = np.float32 if is_cnn else np.float64
        trainers = [trainer_of(CONFIGS[name], count) for count in (1, 8)]
        epochs, batches = (1, 1) if is_cnn else (4, trainers[0].steps_per_epoch)
        ends = [train(trainer, dtype, epochs, batches) for trainer in trainers]
        found: dict[str, Any] = {"collectives": list(map(collectives, trainers))}
        (one, _), (eight, _) = ends
        if is_cnn:
            one, eight = gradients(one), gradients(eight)
        else:
            rounded = cast(one, np.float32)
            tests = [[*t.evaluate(t.put_state(rounded), "test")][-1] for t in trainers]
            pairs = [metrics for _, metrics in ends], tests
            found["counts"] = [[[int(m.count), int(m.correct)] for m in pair] for pair in pairs]
    return found | {"difference": largest_difference(eight, one)}


def run(fields: dict[str, Any], *devices: int | None) -> dict[str, Any]:
    """The record of a run, whose parts run on these numbers of devices, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {**RUN, **fields, "workdir": Path(folder)}
        for count in devices[:-1]:
            with contextlib.suppress(InterruptedRunError):
                fit(Config(devices=count, **fields), callbacks=[StopAfter(1)])
        record = fit(Config(devices=devices[-1], **fields), callbacks=[]).record
    return {"devices": len(record["devices"]), "test_correct": record["test_correct"]}


def runs() -> dict[str, list[dict]]:
    """A lone network, and four members: on the one by default, and moved to others."""
    plans = {"alone": ({"ema_decay": 0.9}, (1, 8)), "members": ({"seeds": 4}, (2, 4))}
    return {name: [run(own, None), run(own, *moves)] for name, (own, moves) in plans.items()}


def arrays() -> list[float]:
    """The loss of replicated parameters, of a kernel split over the devices, and in bfloat16."""
    trainer = trainer_of(Config(model="logistic", batch_size=100), 8)
    whole, split = trainer.init(), sharded(make_mesh(jax.devices()))
    logits = whole.params["logits"]
    logits = {**logits, "kernel": jax.device_put(logits["kernel"], split)}
    parts = whole._replace(params={"logits": logits})
    halves = whole._replace(params=jax.tree.map(lambda x: x.astype("bfloat16"), whole.params))
    return [[*trainer.evaluate(x, "test")][-1].loss for x in (whole, parts, halves)]


if __name__ == "__main__":
    with use_device("cpu", "float32"):
        others = {"runs": runs, "arrays": arrays}
        found = {name: others.get(name, partial(examine, name))() for name in sys.argv[1:]}
        print(json.dumps(found))
