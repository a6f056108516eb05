"""Run by test_mesh.py in a process with eight CPU devices; prints what it finds as JSON.

Arguments: models whose compiled train steps are examined, "runs" for calls of `fit`, "shardings"
for one Trainer with arrays of several shardings.
"""

import contextlib
import json
import re
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import small

from mnist_jax.compiled_steps import Trainer, make_steps
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.data.batches import num_batches
from mnist_jax.errors import InterruptedRunError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel.mesh import make_mesh, put, replicated, sharded, to_host, use_device
from mnist_jax.signals import Stop
from mnist_jax.steps import make_step_config
from mnist_jax.training import fit

SIZE, BATCH_SIZE = 300, 36  # 36 images on 8 devices: 4 rows of padding
SPLIT = small.make_split(SIZE, seed=0)
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
CONFIGS = {
    "mlp": Config(model="mlp", hidden_sizes=(16,), dropout=0.3, shift=2.0, ema_decay=0.9),
    "cnn": Config(model="cnn", hidden_sizes=(16,), shift=2.0),
}
RUN = {"model": "logistic", "dataset": "digits", "epochs": 2, "steps_per_call": 5}


def largest_difference(tree: Any, reference: Any) -> float:
    """Of all leaves, relative to the largest number of the leaf."""
    pairs = zip(*map(jax.tree.leaves, (tree, reference)), strict=True)
    return float(max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs))


class Training:
    """The compiled steps of a config on `count` devices, and their arguments."""

    def __init__(self, config: Config, count: int, dtype: Any):
        config, mesh = config.resolve(), make_mesh(jax.devices()[:count])
        self.put = partial(put, sharding=replicated(mesh))
        self.steps = make_steps(
            MODELS[config.model](**config.arguments("model")),
            make_optimizer(**config.optimizer_arguments(), steps=100),
            mesh,
            train_size=SIZE,
            batch_size=BATCH_SIZE,
            step_config=make_step_config(config),
        )

        def cast(x: Any) -> np.ndarray:
            return np.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None)

        key = jax.random.key(config.seed)
        start = to_host(self.steps.init_state(key)), Metrics.zeros()
        self.state, self.metrics = self.put(jax.tree.map(cast, start))
        self.data = self.put(SPLIT)
        self.key = jax.random.wrap_key_data(self.put(to_host(jax.random.key_data(key))))
        arguments = self.arguments(self.state, epoch=0, batches=0)
        self.compiled = self.steps.train_steps.lower(*arguments).compile()

    def arguments(self, state: Any, epoch: int, batches: int) -> tuple:
        order = self.steps.epoch_permutation(self.key, self.put(np.int32(epoch)))
        numbers = self.put((np.int32(0), np.int32(batches)))
        return state, self.metrics, self.data, order, self.key, *numbers

    def train(self, epochs: int, batches: int) -> tuple[Any, Metrics]:
        """The state after so many epochs of so many batches, and the metrics of the last."""
        state, metrics = self.state, self.metrics
        for epoch in range(epochs):
            state, metrics, _ = self.compiled(*self.arguments(state, epoch, batches))
        return to_host(state), to_host(metrics)

    def evaluate(self, params: Any) -> Metrics:
        params, *numbers = self.put((params, np.int32(0), np.int32(2)))
        return to_host(self.steps.eval_steps(params, {}, self.metrics, self.data, *numbers))

    def collectives(self) -> dict[str, list[int]]:
        """For each collective operation of the program, its numbers of floating-point operands."""
        found: dict[str, list[int]] = {}
        pattern = rf" = (.*?) ({COLLECTIVES})(?:-start)?\("
        for types, name in re.findall(pattern, self.compiled.as_text()):
            found.setdefault(name, []).append(len(re.findall(r"f\d\d\[", types)))
        return {name: sorted(numbers) for name, numbers in found.items()}


def gradients(state: Any) -> list[np.ndarray]:
    """Of the first batch: Adam's first moment after one step is proportional to them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]


def examine(name: str) -> dict[str, Any]:
    """One device against eight: collectives, and in float64 the state after four epochs.

    Of the CNN only the gradients of a batch, in float32.
    """
    is_cnn = name == "cnn"
    with jax.enable_x64(not is_cnn):
        dtype = np.float32 if is_cnn else np.float64
        trainings = [Training(CONFIGS[name], count, dtype) for count in (1, 8)]
        found: dict[str, Any] = {"collectives": [each.collectives() for each in trainings]}
        if is_cnn:
            one, eight = (gradients(each.train(epochs=1, batches=1)[0]) for each in trainings)
        else:
            batches = num_batches(SIZE, BATCH_SIZE)
            ends = [each.train(epochs=4, batches=batches) for each in trainings]
            (one, _), (eight, _) = ends
            tests = [each.evaluate(one.params) for each in trainings]
            pairs = [metrics for _, metrics in ends], tests
            found["counts"] = [[[int(m.count), int(m.correct)] for m in pair] for pair in pairs]
    return found | {"difference": largest_difference(eight, one)}


def run(fields: dict[str, Any], *devices: int) -> dict[str, Any]:
    """The record of a run, whose parts run on these numbers of devices, one after the other."""
    stop = Stop(signal.SIGTERM)  # a part ends after its first call
    with tempfile.TemporaryDirectory() as folder:
        fields = {**RUN, **fields, "workdir": Path(folder)}
        for count in devices[:-1]:
            with contextlib.suppress(InterruptedRunError):
                fit(Config(devices=count, **fields), callbacks=[], stop=stop)
        record = fit(Config(devices=devices[-1], **fields), callbacks=[]).record
    return {"devices": len(record["devices"]), "test_correct": record["test_correct"]}


def runs() -> dict[str, list[dict]]:
    """A lone network, and four members: on one device, and moved to others."""
    plans = {"alone": ({"ema_decay": 0.9}, (1, 8)), "members": ({"seeds": 4}, (2, 4))}
    return {name: [run(own, 1), run(own, *moves)] for name, (own, moves) in plans.items()}


def shardings() -> list[int]:
    """Correct test images with replicated parameters, then with a kernel split over the devices."""
    config, mesh = Config(model="logistic", batch_size=100).resolve(), make_mesh(jax.devices())
    dataset = Dataset("mnist", SPLIT, SPLIT, "", (), ())
    model, tx = MODELS["logistic"](), make_optimizer(**config.optimizer_arguments(), steps=100)
    trainer = Trainer(model, tx, dataset, config, mesh)
    whole = trainer.init()
    logits = whole.params["logits"]
    logits = {**logits, "kernel": jax.device_put(logits["kernel"], sharded(mesh))}
    parts = whole._replace(params={"logits": logits})
    return [int(list(trainer.evaluate(s, "test"))[-1].correct) for s in (whole, parts)]


if __name__ == "__main__":
    with use_device("cpu", "float32"):
        others = {"runs": runs, "shardings": shardings}
        found = {name: others.get(name, partial(examine, name))() for name in sys.argv[1:]}
        print(json.dumps(found))
