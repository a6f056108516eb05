"""Whether the CNN's faster convolution costs accuracy: beside XLA's own, and beside mere rounding.

    python -m benchmarks.rounding --manual_dir path/to/mnist --output FILE

Both train from the same parameters on the same batches with the same dropout, and differ by
float32's rounding alone, which training amplifies. By how much, show a third way and a fourth: the
faster convolution again, with every initial parameter moved by about its last bit, up or down.
Where the first way ends, both ways' gradients are set against float64's.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich import box
from rich.table import Table

from benchmarks import launch
from benchmarks.results import Recorder, Results
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Dataset, load_dataset
from mnist_jax.models import MODELS
from mnist_jax.ops import convolution
from mnist_jax.optimizer import make_optimizer, step_config
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import environment
from mnist_jax.runs.checkpoint import names_of
from mnist_jax.runs.statistics import summarize
from mnist_jax.trainer import EVAL_BATCH_SIZE

OURS, XLAS, UP, DOWN = "ours", "XLA's own", "ours, moved up", "ours, moved down"
LAST_BIT = np.finfo(np.float32).eps  # between 1 and the next float32
FACTORS = {OURS: 1, XLAS: 1, UP: 1 + LAST_BIT, DOWN: 1 - LAST_BIT}  # of the initial parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.DataOptions):
    """The flags."""

    steps: int = 200
    """Training steps of each network."""
    batch_size: int = 100
    """Images a training step."""
    repeats: int = 5
    """Networks trained each way, with seeds from 1234 on."""


class Trainer(NamedTuple):
    """The CNN's, compiled when first called; a step is a dispatch, as XLA's own wants it.

    Attributes:
        init: key → state.
        step: state, order, number of the batch, key → state; the state is donated.
        right: parameters, number of the batch → how many of these test images are right.
        gradients: parameters → those of the loss of the first images, without dropout.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    right: Callable[..., Any]
    gradients: Callable[..., Any]


def programs(options: Options, dataset: Dataset) -> Trainer:
    """Those of a run at the default recipe."""
    config = Config(model="cnn", batch_size=options.batch_size)
    model, recipe = MODELS[config.model](**config.model_options()), step_config(config)
    tx = make_optimizer(config, options.steps)
    train, test = jax.device_put((dataset.train, dataset.test))

    def init(key):
        return steps.init_state(key, model=model, tx=tx)

    def step(state, order, i, key):
        batch = steps.take_batch(train, order, i, batch_size=config.batch_size)
        return steps.train_step(state, batch, key, model=model, tx=tx, recipe=recipe)[0]

    def right(params, i):
        batch = steps.take_batch(test, None, i, batch_size=EVAL_BATCH_SIZE)
        return steps.eval_step(params, batch, model=model, recipe=recipe).correct

    def gradients(params):
        batch = steps.take_batch(train, None, jnp.int32(0), batch_size=config.batch_size)
        return jax.grad(lambda p: steps.loss_fn(p, batch, model=model, recipe=recipe)[0])(params)

    made = init, step, right, gradients
    return Trainer(*(jax.jit(f, donate_argnums=0 if f is step else ()) for f in made))


@contextlib.contextmanager
def xlas_own() -> Iterator[None]:
    """What is traced inside has XLA's convolutions in the place of ours."""
    with mock.patch.object(convolution, "conv_general_dilated", lax.conv_general_dilated):
        yield


def gradient_errors(ours: Trainer, xlas: Trainer, params: Any) -> dict[str, dict[str, float]]:
    """How far either way's gradients are from XLA's own in float64, by way and parameter.

    Relative: the norm of the difference divided by the norm.
    """
    found = {OURS: ours.gradients(params)}
    with xlas_own():
        found[XLAS] = xlas.gradients(params)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(params))
            exact = names_of(jax.device_get(xlas.gradients(wide)))
    return {
        way: {
            name: float(np.linalg.norm(leaf - exact[name]) / np.linalg.norm(exact[name]))
            for name, leaf in names_of(jax.device_get(gradients)).items()
        }
        for way, gradients in found.items()
    }


def trained(
    made: Trainer, dataset: Dataset, options: Options, seed: int, factor: float
) -> tuple[Any, int]:
    """Trains a network; returns its parameters, and how many test images it gets right."""
    key, size = jax.random.key(seed), len(dataset.train.label)
    state = made.init(key)
    moved = jax.tree.map(lambda x: x * np.float32(factor), state.params)
    state = state._replace(params=moved)
    per_epoch = steps.num_batches(size, options.batch_size)
    for epoch in range(steps.num_batches(options.steps, per_epoch)):
        order = steps.epoch_permutation(key, epoch, size=size)
        for i in range(min(per_epoch, options.steps - epoch * per_epoch)):
            state = made.step(state, order, np.int32(i), key)
    batches = steps.num_batches(len(dataset.test.label), EVAL_BATCH_SIZE)
    correct = sum(int(made.right(state.params, np.int32(i))) for i in range(batches))
    return state.params, correct


def measure(options: Options) -> None:
    """Trains every network in every way, prints the table and writes the file."""
    data = options.prepare()
    dataset = load_dataset(data["dataset"], data_dir=data["data_dir"])
    with devices.running_on("cpu", "float32") as device:  # elsewhere both ways are XLA's
        recorder = Recorder(
            options.output, environment.describe(device) | {"dataset": dataset.name}
        )
        ours, xlas = (programs(options, dataset) for _ in range(2))
        for seed in range(1234, 1234 + options.repeats):
            for way, factor in FACTORS.items():
                with xlas_own() if way == XLAS else contextlib.nullcontext():
                    made = xlas if way == XLAS else ours
                    end, correct = trained(made, dataset, options, seed, factor)
                tested = {"correct": correct, "count": len(dataset.test.label)}
                recorder.row("rounding", seed=seed, way=way, steps=options.steps, **tested)
                launch.say(f"seed {seed}, {way}: {correct / tested['count']:.2%}")
                if way == OURS:
                    for whose, errors in gradient_errors(ours, xlas, end).items():
                        recorder.row("gradients", seed=seed, way=whose, errors=errors)
            recorder.write()
    launch.show(report(recorder.found))


def report(found: Results) -> list[Table]:
    """Each way's accuracy, and its distance from ours with the same seed; and the gradients."""
    rows = found.tables["rounding"]
    shares = {
        way: np.array([row["correct"] / row["count"] for row in rows if row["way"] == way])
        for way in FACTORS
    }
    title = (
        f"the CNN after {rows[0]['steps']} steps on {found.context['dataset']}, in points of 1 %"
    )
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("convolution", "n", "mean accuracy", "minus ours", "95 %", "at most apart"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way, share in shares.items():
        apart = 100 * (share - shares[OURS])
        mean = summarize(apart.tolist())
        low, high = mean["ci95"] or (np.nan, np.nan)
        numbers = (f"{mean['mean']:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{abs(apart).max():.2f}")
        numbers = ("", "", "") if way == OURS else numbers
        table.add_row(way, str(len(share)), f"{100 * share.mean():.2f}", *numbers)
    return [table, gradient_table(found.tables["gradients"])]


def gradient_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Of each layer the error of its worse parameter: the median over the seeds, and the most."""
    title = "gradients' relative distance from float64's: median of the seeds, and most"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("layer")
    for way in (OURS, XLAS):
        table.add_column(way, justify="right", no_wrap=True)
    layers = dict.fromkeys(name.partition("/")[0] for name in rows[0]["errors"])
    for layer in layers:
        cells = []
        for way in (OURS, XLAS):
            worse = [
                max(e for name, e in row["errors"].items() if name.startswith(f"{layer}/"))
                for row in rows
                if row["way"] == way
            ]
            cells.append(f"{np.median(worse):.0e}, {max(worse):.0e}")
        table.add_row(layer, *cells)
    return table


if __name__ == "__main__":
    sys.exit(launch.command(Options, measure, "python -m benchmarks.rounding", __doc__ or ""))
