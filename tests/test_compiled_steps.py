"""Trainer: the compiled programs of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mnist_jax import Config, Dataset, models, steps
from mnist_jax.compiled_steps import Trainer
from mnist_jax.data.batches import Batch
from mnist_jax.parallel.mesh import make_mesh


def test_arrays_of_another_dtype_get_a_program_of_their_own():
    """The same with another sharding: see tests/parallel/test_mesh.py."""
    split, model = small.make_split(20, seed=0), models.LogisticRegression()
    dataset = Dataset("mnist", split, split, "", (), ())
    mesh = make_mesh(jax.devices()[:1])
    trainer = Trainer(model, optax.sgd(0.1), dataset, Config(batch_size=10).resolve(), mesh)
    state = trainer.init()
    batch: Batch = {**split._asdict(), "mask": np.ones(20, bool)}
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), state.params)
        (metrics,) = trainer.evaluate(state._replace(params=params), "test")
        expected = steps.eval_step(params, {}, batch, model=model)
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-3)
