"""Flax Linen as its examples write it: one jitted call a step, on batches taken on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks.workers import job as jobs
from mnist_jax.compiler import MATMUL_PRECISION


class Net(nn.Module):
    """The tutorial's network of that name."""

    model: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 28, 28, 1) → logits (batch, 10), in training."""
        if self.model == "cnn":
            x = nn.relu(nn.Conv(64, (3, 3), dtype=self.dtype)(x))
            x = nn.Conv(64, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(nn.max_pool(x, (2, 2), strides=(2, 2)))
            x = nn.relu(nn.Conv(128, (3, 3), dtype=self.dtype)(x))
            x = nn.Conv(256, (3, 3), padding="VALID", dtype=self.dtype)(x)
            x = nn.relu(nn.max_pool(x, (2, 2), strides=(2, 2)))
        x = x.reshape((x.shape[0], -1))
        for size in jobs.HIDDEN_SIZES[self.model]:
            x = nn.relu(nn.Dense(size, dtype=self.dtype)(x))
            if self.model == "cnn":
                x = nn.Dropout(jobs.DROPOUT, deterministic=False)(x)
        return nn.Dense(jobs.NUM_CLASSES, dtype=self.dtype)(x).astype(jnp.float32)


@jax.jit
def train_step(state: TrainState, image: Any, label: Any, key: jax.Array) -> TrainState:
    """One update."""

    def loss_fn(params):
        rngs = {"dropout": jax.random.fold_in(key, state.step)}
        logits = state.apply_fn({"params": params}, image, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def make(job: jobs.Job, data: jobs.Data) -> jobs.Workload:
    """The network with `optax.adam`."""
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[job.precision])
    data = data.as_float()
    net = Net(job.model, jnp.bfloat16 if job.precision == "bfloat16" else None)
    key = jax.random.key(0)
    params = net.init({"params": key, "dropout": key}, jnp.zeros((1, 28, 28, 1)))["params"]
    tx = optax.adam(jobs.LEARNING_RATE, eps=jobs.EPSILON)
    start = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
    done = 0

    def train(state: TrainState, steps: int) -> TrainState:
        nonlocal done
        for _ in range(steps):
            index = data.batch_index(done, job.batch_size)
            state = train_step(state, data.image[index], data.label[index], key)
            done += 1
        return state

    return jobs.Workload(state=start, train=train, sync=jax.block_until_ready)
