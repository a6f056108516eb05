"""What runs on eight devices of a CPU: `python tests/on_devices.py`, by tests/test_devices.py.

In a process of its own, as JAX asks once how many devices a CPU shall be. Prints one JSON object.
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

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data.split import Split
from mnist_jax.devices import Layout, running_on
from mnist_jax.errors import InterruptedRunError
from mnist_jax.metrics import MetricSums
from mnist_jax.models import MODELS
from mnist_jax.programs import Jitted, jitted
from mnist_jax.recipe import make_optimizer, make_recipe
from mnist_jax.signals import Stop
from mnist_jax.training import Observer, fit

SIZE = 300  # images
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def split() -> Split:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, 28, 28, 1), np.uint8)
    return Split(image, rng.integers(0, 10, SIZE, np.int32))


def programs(config: Config, count: int) -> tuple[Jitted, Layout]:
    layout = Layout.over(jax.devices()[:count])
    model = MODELS[config.model](**config.model_options())
    made = jitted(
        model,
        make_optimizer(config, 100),
        jax.devices()[0],
        train_size=SIZE,
        batch_size=config.batch_size,
        recipe=make_recipe(config),
        layout=layout,
        donate=False,
    )
    return made, layout


def trained(config: Config, count: int, steps_: int, dtype=np.float32):
    """The state after so many steps on so many devices, and the sums, on the host."""
    made, layout = programs(config, count)
    key = jax.random.key(config.seed)
    if layout.mesh is not None:
        key = jax.random.wrap_key_data(layout.place(jax.random.key_data(key)))
    state = layout.fetch(made.init_state(key))
    state = layout.place(jax.tree.map(lambda x: x.astype(cast(x, dtype)), state))
    zeros = jax.tree.map(lambda x: x.astype(cast(x, dtype)), MetricSums.zeros())
    data, sums = layout.place(split()), zeros
    per_epoch, done = steps.num_batches(SIZE, config.batch_size), 0
    while done < steps_:
        epoch, first = divmod(done, per_epoch)
        count_ = min(per_epoch - first, steps_ - done)
        order = made.epoch_order(key, np.int32(epoch))
        args = state, sums, data, order, key, np.int32(first), np.int32(count_)
        state, sums = made.train_steps(*args)
        sums = layout.fetch(sums)
        done += count_
    tested = layout.fetch(made.eval_steps(state, zeros, data, np.int32(0), np.int32(2)))
    return layout.fetch(state), sums, tested


def cast(x, dtype):
    return dtype if np.issubdtype(x.dtype, np.floating) else x.dtype


def apart(a, b) -> float:
    """The largest difference of a leaf, relative to that leaf's largest number."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for x, y in pairs)


def first_gradients(config: Config, count: int):
    """Of the first batch, by the first moment that Adam keeps after one step."""
    state, _, _ = trained(config, count, 1)
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "mu" in str(path)]


def collectives(config: Config, count: int) -> dict[str, list[int]]:
    """How many operands each collective operation of the compiled steps has, by its name."""
    made, layout = programs(config, count)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(made.init_state, key)
    whole = layout.whole

    def on_all(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    order = jnp.zeros(SIZE, np.int32)
    args = jax.tree.map(on_all, (state, MetricSums.zeros(), split(), order, key))
    text = made.train_steps.lower(*args, np.int32(0), np.int32(3)).compile().as_text()
    found: dict[str, list[int]] = {}
    for types, name in re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", text):
        floats = len(re.findall(r"f32\[", types))
        found.setdefault(name, []).append(floats)
    return found


def plain_text(config: Config) -> tuple[str, str]:
    """The compiled steps on one device, as a run makes them and as `steps` alone gives them."""
    made, layout = programs(config, 1)
    model = MODELS[config.model](**config.model_options())
    tx, recipe = make_optimizer(config, 100), make_recipe(config)
    sizes = {"batch_size": config.batch_size, "recipe": recipe}
    plain = jax.jit(partial(steps.train_steps, model=model, tx=tx, **sizes))
    key = jax.random.key(0)
    args = made.init_state(key), MetricSums.zeros(), layout.place(split())
    args = *args, made.epoch_order(key, 0), key, np.int32(0), np.int32(3)
    texts = [f.lower(*args).as_text() for f in (made.train_steps, plain)]
    return tuple(re.sub(r"@jit_\w+", "@jit", text) for text in texts)  # pyright: ignore


class Interrupts(Observer):
    """Asks a run to end in its second epoch."""

    def __init__(self):
        self.stop = Stop()

    def on_call(self, epoch, step, last_step, sums, train_s):
        if epoch == 2 and step:
            self.stop.signal = signal.SIGTERM


def run(folder: Path, config: Config, *devices: int) -> dict:
    """The record of a run, each part of it on so many devices."""
    for number, count in enumerate(devices, start=1):
        asked = dataclasses.replace(config, devices=count, workdir=folder)
        if number == len(devices):
            return fit(asked).record
        interrupts = Interrupts()
        with contextlib.suppress(InterruptedRunError):
            fit(asked, observer=interrupts, stop=interrupts.stop)
    raise AssertionError


def runs(folder: Path) -> dict[str, list[dict]]:
    """Records of the same run on one device, on many, and begun on either and ended on the other.

    Of an ensemble of 11 members, too, which need 6 of 8 devices.
    """
    one = {"dataset": "digits", "epochs": 2, "steps_per_call": 5, "batch_size": 100}
    mlp = Config(model="mlp", hidden_sizes=(16,), validation=300, average=0.9, **one)
    members = Config(model="logistic", seeds=11, **one)
    turns = Config(model="mlp", seeds=3, hidden_sizes=(128,), **one)
    found = {}
    for name, config in (("alone", mlp), ("members", members), ("in turn", turns)):
        plans = [(1,), (8,), (8, 1), (1, 8)] if name != "in turn" else [(1,), (2, 8)]
        records = [run(folder / f"{name} {plan}", config, *plan) for plan in plans]
        kept = "test_correct", "test_count", "params_sha256", "devices"
        found[name] = [{key: record[key] for key in kept} for record in records]
    return found


def main() -> None:
    small = {"dataset": "digits", "batch_size": 36, "hidden_sizes": (16,)}  # 36 over 8: 4 idle rows
    configs = {
        "logistic": Config(model="logistic", dataset="digits", batch_size=36),
        "mlp": Config(model="mlp", preset="best", dropout=0.3, **small),
        "cnn": Config(model="cnn", preset="fast", **small),
    }
    found: dict = {"collectives": {}, "gradients": {}, "steps": {}, "counts": {}}
    with running_on("cpu", "float32"):
        for name, config in configs.items():
            found["collectives"][name] = collectives(config, 8)
            one, many = (first_gradients(config, count) for count in (1, 8))
            found["gradients"][name] = apart(one, many)
        found["plain"] = [a == b for a, b in map(plain_text, configs.values())]
        with jax.enable_x64(True):
            for name in ("logistic", "mlp"):
                one, *others = (trained(configs[name], n, 50, np.float64) for n in (1, 2, 4, 8))
                found["steps"][name] = [apart(one[0], other[0]) for other in others]
                sums = [[int(s.count), int(s.correct)] for _, s, _ in (one, *others)]
                tests = [[int(t.count), int(t.correct)] for _, _, t in (one, *others)]
                found["counts"][name] = [sums, tests]
    with tempfile.TemporaryDirectory() as folder:
        found["runs"] = runs(Path(folder))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
