"""This project: `steps.train_steps`, compiled and called as `mnist_jax.programs` does it.

The images lie on the device as uint8; a call gathers, normalises and trains on as many batches as
a sample has steps, with the state donated and the metrics summed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.peer_workers import job as jobs
from mnist_jax import devices, runs, steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.metrics import MetricSums
from mnist_jax.models import MODELS
from mnist_jax.training import make_optimizer


class Programs(NamedTuple):
    """The jitted functions; `steps` is a run-time number on a CPU and static elsewhere."""

    init: Any
    train_steps: Any
    eval_steps: Any


def programs(config: Config, device: jax.Device) -> Programs:
    """Those of a run, not yet compiled."""
    model, tx = MODELS[config.model](), make_optimizer(config)
    static = () if device.platform == "cpu" else ("steps",)
    common = {"model": model, "normalize": config.normalize}
    train_steps = partial(steps.train_steps, tx=tx, batch_size=config.batch_size, **common)
    eval_steps = partial(steps.eval_steps, batch_size=jobs.EVAL_BATCH_SIZE, **common)
    return Programs(
        jax.jit(partial(steps.init_state, model=model, tx=tx)),
        jax.jit(train_steps, static_argnames=static, donate_argnames="state"),
        jax.jit(eval_steps, static_argnames=static),
    )


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The package's own training and evaluation, at the default recipe."""
    config = Config(model=job.model, batch_size=job.batch_size)
    device = jax.devices()[0]
    init, train_steps, eval_steps = programs(config, device)
    root_key, zero = jax.random.key(config.seed), jnp.int32(0)
    split, test, order = jax.device_put(
        (Split(data.image, data.label), Split(data.test_image, data.test_label), data.order), device
    )
    epoch = job.train_size // job.batch_size

    def train(state: steps.TrainState, count: int) -> steps.TrainState:
        for first in range(0, count, epoch):
            some, sums = min(epoch, count - first), MetricSums.zeros()
            state, _ = train_steps(state, sums, split, order, root_key, zero, steps=some)
        return state

    def evaluate(state: steps.TrainState, batches: int) -> MetricSums:
        return eval_steps(state.params, MetricSums.zeros(), test, zero, steps=batches)

    context = runs.environment(device)
    return jobs.Workload(init(root_key), train, evaluate, jax.block_until_ready, context)


if __name__ == "__main__":
    with jax.default_matmul_precision(devices.MATMUL_PRECISION["float32"]):
        jobs.main(make)
