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
import numpy as np

from benchmarks.scaling import apart
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data.split import Split
from mnist_jax.errors import InterruptedRunError, UsageError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.optimizer import make_optimizer, step_config
from mnist_jax.parallel.mesh import Layout, running_on
from mnist_jax.signals import Stop
from mnist_jax.trainer import Steps, make_steps
from mnist_jax.training import Callback, fit

SIZE = 300  # images
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def split() -> Split:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIZE, 28, 28, 1), np.uint8)
    return Split(image, rng.integers(0, 10, SIZE, np.int32))


def programs(config: Config, count: int) -> tuple[Steps, Layout]:
    layout = Layout.over(jax.devices()[:count])
    model = MODELS[config.model](**config.model_options())
    made = make_steps(
        model,
        make_optimizer(config, 100),
        jax.devices()[0],
        train_size=SIZE,
        batch_size=config.batch_size,
        recipe=step_config(config),
        layout=layout,
        donate=False,
    )
    return made, layout


class Training:
    """Compiled training steps of a config on so many devices, and what they start from."""

    def __init__(self, config: Config, count: int, dtype=np.float32):
        self.made, self.layout = programs(config, count)
        alone, _ = programs(config, 1)
        self.per_epoch = steps.num_batches(SIZE, config.batch_size)

        def placed(tree):
            tree = jax.tree.map(lambda x: x.astype(cast(x, dtype)), jax.device_get(tree))
            return self.layout.place(tree)

        key = jax.random.key(config.seed)
        self.state, self.zeros = placed(alone.init_state(key)), placed(Metrics.zeros())
        self.data = self.layout.place(split())
        self.orders = [placed(alone.epoch_permutation(key, np.int32(epoch))) for epoch in range(9)]
        self.key = jax.random.wrap_key_data(self.layout.place(jax.random.key_data(key)))
        first = self.state, self.zeros, self.data, self.orders[0], self.key, np.int32(0)
        # Half the time to compile is spared where no bits are compared, and for the CNN.
        exact = config.microbatches > 1 and config.model != "cnn"
        options = {} if exact else {"xla_backend_optimization_level": 0}
        lowered = self.made.train_steps.lower(*first, np.int32(0))
        self.compiled = lowered.compile(compiler_options=options)

    def after(self, steps_: int):
        """The state after so many steps, and the metrics' sums, on the host."""
        state, sums, done = self.state, self.zeros, 0
        while done < steps_:
            epoch, first = divmod(done, self.per_epoch)
            count = min(self.per_epoch - first, steps_ - done)
            numbers = np.int32(first), np.int32(count)
            state, sums = self.compiled(
                state, sums, self.data, self.orders[epoch], self.key, *numbers
            )
            done += count
        return self.layout.fetch(state), self.layout.fetch(sums)

    def tested(self, state):
        """The sums over all images."""
        state = self.layout.place(state)
        return self.layout.fetch(
            self.made.eval_steps(state, self.zeros, self.data, np.int32(0), np.int32(2))
        )

    def first_gradients(self) -> list[np.ndarray]:
        """Of the first batch, by the first moment that Adam keeps after one step."""
        leaves = jax.tree_util.tree_leaves_with_path(self.after(1)[0])
        return [leaf for path, leaf in leaves if "mu" in str(path)]

    def collectives(self) -> dict[str, list[int]]:
        """How many float32 operands each collective operation of the program has, by its name."""
        found: dict[str, list[int]] = {}
        for types, name in re.findall(
            rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", self.compiled.as_text()
        ):
            found.setdefault(name, []).append(len(re.findall(r"f32\[", types)))
        return found


def cast(x, dtype):
    return dtype if np.issubdtype(x.dtype, np.floating) else x.dtype


def plain_text(config: Config) -> tuple[str, str]:
    """The compiled steps on one device, as a run makes them and as `steps` alone gives them."""
    made, layout = programs(config, 1)
    model = MODELS[config.model](**config.model_options())
    tx, recipe = make_optimizer(config, 100), step_config(config)
    sizes = {"batch_size": config.batch_size, "recipe": recipe}
    plain = jax.jit(partial(steps.train_steps, model=model, tx=tx, **sizes))
    key = jax.random.key(0)
    args = made.init_state(key), Metrics.zeros(), layout.place(split())
    args = *args, made.epoch_permutation(key, 0), key, np.int32(0), np.int32(3)
    texts = [f.lower(*args).as_text() for f in (made.train_steps, plain)]
    return tuple(re.sub(r"@jit_\w+", "@jit", text) for text in texts)  # pyright: ignore


class Interrupts(Callback):
    """Asks a run to end in its second epoch."""

    def __init__(self):
        self.stop = Stop()

    def on_chunk_end(self, epoch, step, last_step, sums, train_s):
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
    mlp = Config(model="mlp", hidden_sizes=(16,), validation=300, ema_decay=0.9, **one)
    members = Config(model="logistic", seeds=11, **one)
    turns = Config(model="mlp", seeds=3, hidden_sizes=(128,), **one)
    found = {}
    for name, config in (("alone", mlp), ("members", members), ("in turn", turns)):
        plans = [(1,), (8,), (8, 1), (1, 8)] if name != "in turn" else [(1,), (2, 8)]
        records = [run(folder / f"{name} {plan}", config, *plan) for plan in plans]
        kept = "test_correct", "test_count", "params_sha256", "devices"
        found[name] = [{key: record[key] for key in kept} for record in records]
    return found


def in_microbatches(config: Config) -> list[bool]:
    """Whether 8 devices, and 2 and 4, train to the bits of one, each batch in eight parts."""
    config = dataclasses.replace(config, microbatches=8)
    # The CNN takes long to compile, and to train.
    many, count = ((8,), 3) if config.model == "cnn" else ((8, 2, 4), 12)
    one, *others = (jax.tree.leaves(Training(config, n).after(count)) for n in (1, *many))
    return [all(map(np.array_equal, one, other)) for other in others]


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
            one, many = Training(config, 1), Training(config, 8)
            found["collectives"][name] = many.collectives()
            found["gradients"][name] = apart(one.first_gradients(), many.first_gradients())
        found["in microbatches"] = [in_microbatches(config) for config in configs.values()]
        halves = dataclasses.replace(configs["logistic"], microbatches=8)
        found["exchanges"] = Training(halves, 4).collectives()
        found["plain"] = [a == b for a, b in map(plain_text, configs.values())]
        with jax.enable_x64(True):
            for name in ("logistic", "mlp"):
                on = [Training(configs[name], count, np.float64) for count in (1, 2, 4, 8)]
                ends = [training.after(50) for training in on]
                found["steps"][name] = [apart(ends[0][0], state) for state, _ in ends[1:]]
                tests = [training.tested(ends[0][0]) for training in on]
                found["counts"][name] = [
                    [[int(x.count), int(x.correct)] for x in sums]
                    for sums in ([sums for _, sums in ends], tests)
                ]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(UsageError):
            run(Path(folder), dataclasses.replace(configs["logistic"], microbatches=4), 8)
            raise AssertionError
        found["runs"] = runs(Path(folder))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
