"""This project: `steps.train_steps`, compiled and called as `mnist_jax.programs` does it.

The images lie on the device as uint8; a call gathers, normalises and trains on as many batches as
a sample has steps, with the state donated and the metrics summed.
"""

import jax
import jax.numpy as jnp

from benchmarks.peer_workers import job as jobs
from mnist_jax import devices, environment, steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.metrics import MetricSums
from mnist_jax.models import MODELS
from mnist_jax.programs import Jitted, jitted
from mnist_jax.recipe import make_optimizer, make_recipe


def programs(config: Config, device: jax.Device, train_size: int) -> Jitted:
    """Those of a run, not yet compiled."""
    return jitted(
        MODELS[config.model](),
        make_optimizer(config, 1),
        device,
        train_size=train_size,
        batch_size=config.batch_size,
        recipe=make_recipe(config),
    )


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The package's own training and evaluation, at the default recipe."""
    config = Config(model=job.model, batch_size=job.batch_size)
    device = jax.devices()[0]
    init_state, _, train_steps, eval_steps = programs(config, device, job.train_size)
    root_key, zero = jax.random.key(config.seed), jnp.int32(0)
    split, test, order = jax.device_put(
        (Split(data.image, data.label), Split(data.test_image, data.test_label), data.order), device
    )
    epoch = job.train_size // job.batch_size

    def train(state: steps.TrainState, count: int) -> steps.TrainState:
        for first in range(0, count, epoch):
            some, sums = min(epoch, count - first), MetricSums.zeros()
            state, _ = train_steps(state, sums, split, order, root_key, zero, some)
        return state

    def evaluate(state: steps.TrainState, batches: int) -> MetricSums:
        return eval_steps(state, MetricSums.zeros(), test, zero, batches)

    context = environment.describe(device)
    return jobs.Workload(init_state(root_key), train, evaluate, jax.block_until_ready, context)


if __name__ == "__main__":
    with jax.default_matmul_precision(devices.MATMUL_PRECISION["float32"]):
        jobs.main(make)
