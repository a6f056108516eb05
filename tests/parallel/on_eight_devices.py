"""Run by test_mesh.py in a process with eight CPU devices; prints what it finds as JSON.

Arguments: models whose compiled train steps are examined, "runs" for calls of `fit`, "shardings"
for one Trainer with arrays of several shardings.
"""

import contextlib
import dataclasses
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

from mnist_jax.compiled_steps import Trainer, make_steps
from mnist_jax.config import Config
from mnist_jax.data import Dataset, Split
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
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
CONFIGS = {
    "logistic": Config(model="logistic"),
    "mlp": Config(model="mlp", hidden_sizes=(16,), dropout=0.3, shift=2.0, ema_decay=0.9),
    "cnn": Config(model="cnn", hidden_sizes=(16,), shift=2.0),
}


def make_split() -> Split:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, 28, 28, 1), np.uint8)
    return Split(image, rng.integers(0, 10, SIZE, np.int32))


def largest_difference(tree: Any, reference: Any) -> float:
    """Of all leaves, relative to the largest number of the leaf."""
    pairs = zip(*map(jax.tree.leaves, (tree, reference)), strict=True)
    return float(max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs))


class Training:
    """The compiled steps of a config on `count` devices, and their arguments."""

    def __init__(self, config: Config, count: int, dtype: Any = np.float32):
        config = config.resolve()
        mesh = make_mesh(jax.devices()[:count])
        self.sharding = replicated(mesh)
        self.steps = make_steps(
            MODELS[config.model](**config.arguments("model")),
            make_optimizer(**config.optimizer_arguments(), steps=100),
            mesh,
            train_size=SIZE,
            batch_size=BATCH_SIZE,
            step_config=make_step_config(config),
            donate=False,
        )

        def cast(x: Any) -> np.ndarray:
            return np.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None)

        key = jax.random.key(config.seed)
        self.state = put(jax.tree.map(cast, to_host(self.steps.init_state(key))), self.sharding)
        self.metrics = put(jax.tree.map(cast, Metrics.zeros()), self.sharding)
        self.data = put(make_split(), self.sharding)
        self.key = jax.random.wrap_key_data(put(to_host(jax.random.key_data(key)), self.sharding))
        lowered = self.steps.train_steps.lower(*self.arguments(self.state, 0, 0, 0))
        self.compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})

    def arguments(self, state: Any, epoch: int, first: int, count: int) -> tuple:
        order = self.steps.epoch_permutation(self.key, put(np.int32(epoch), self.sharding))
        numbers = put((np.int32(first), np.int32(count)), self.sharding)
        return state, self.metrics, self.data, order, self.key, *numbers

    def train(self, epochs: int) -> tuple[Any, Metrics]:
        """The state and the metrics after so many epochs."""
        state, metrics, count = self.state, self.metrics, num_batches(SIZE, BATCH_SIZE)
        for epoch in range(epochs):
            state, metrics, _ = self.compiled(*self.arguments(state, epoch, 0, count))
        return to_host(state), to_host(metrics)

    def evaluate(self, params: Any) -> Metrics:
        numbers = put((np.int32(0), np.int32(2)), self.sharding)
        arguments = put(params, self.sharding), {}, self.metrics, self.data, *numbers
        return to_host(self.steps.eval_steps(*arguments))

    def first_gradients(self) -> list[np.ndarray]:
        """Of the first batch: Adam's first moment after one step is proportional to them."""
        state = to_host(self.compiled(*self.arguments(self.state, 0, 0, 1))[0])
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return [leaf for path, leaf in leaves if ".mu" in jax.tree_util.keystr(path)]

    def collectives(self) -> dict[str, list[int]]:
        """For each collective operation of the program, its number of float32 operands."""
        found: dict[str, list[int]] = {}
        pattern = rf" = (.*?) ({COLLECTIVES})(?:-start)?\("
        for types, name in re.findall(pattern, self.compiled.as_text()):
            found.setdefault(name, []).append(len(re.findall(r"f32\[", types)))
        return found


def examine(name: str) -> dict[str, Any]:
    """One device against eight: collectives, gradients, and in float64 four epochs."""
    one, eight = (Training(CONFIGS[name], count) for count in (1, 8))
    found = {
        "collectives": [training.collectives() for training in (one, eight)],
        "gradients": largest_difference(eight.first_gradients(), one.first_gradients()),
    }
    if name == "cnn":
        return found
    with jax.enable_x64(True):
        trainings = [Training(CONFIGS[name], count, np.float64) for count in (1, 8)]
        (state, metrics), (other, other_metrics) = [t.train(epochs=4) for t in trainings]
        tests = [t.evaluate(state.params) for t in trainings]
    found["float64"] = largest_difference(other, state)
    found["counts"] = [
        [[int(m.count), int(m.correct)] for m in pair] for pair in ((metrics, other_metrics), tests)
    ]
    return found


def run(config: Config, *devices: int) -> dict:
    """The record of a run, whose parts run on these numbers of devices, one after the other."""
    stop = Stop()
    stop.signal = signal.SIGTERM  # a part ends after its first call
    for count in devices[:-1]:
        with contextlib.suppress(InterruptedRunError):
            fit(dataclasses.replace(config, devices=count), stop=stop)
    record = fit(dataclasses.replace(config, devices=devices[-1])).record
    kept = "test_correct", "test_count", "params_sha256", "devices"
    return {name: record[name] for name in kept}


def runs() -> dict[str, list[dict]]:
    """A lone network, and four members, on one device, on many, and moved between them."""
    options = {"model": "logistic", "dataset": "digits", "epochs": 2, "steps_per_call": 5}
    alone, members = Config(ema_decay=0.9, **options), Config(seeds=4, **options)
    plans = [(alone, "alone", plan) for plan in ((1,), (1, 8))]
    plans += [(members, "members", plan) for plan in ((1,), (2, 4))]
    found: dict[str, list[dict]] = {"alone": [], "members": []}
    with tempfile.TemporaryDirectory() as folder:
        for i, (config, name, plan) in enumerate(plans):
            workdir = Path(folder) / str(i)
            found[name].append(run(dataclasses.replace(config, workdir=workdir), *plan))
    return found


def shardings() -> list[int]:
    """Correct test images with replicated parameters, then with a kernel split over the devices."""
    config, mesh = Config(model="logistic", batch_size=100).resolve(), make_mesh(jax.devices())
    split = make_split()
    dataset = Dataset("mnist", split, split, "", (), ())
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
