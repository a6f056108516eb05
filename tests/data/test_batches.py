"""The order of an epoch: each example once, at random. The batches: see test_steps.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax.steps import epoch_permutation

ROOT = jax.random.key(0)


def test_the_order_is_determined_by_epoch_and_seed():
    def orders():
        keys = [jax.random.key(seed, impl="threefry2x32") for seed in (0, 1)]
        return [epoch_permutation(k, e, size=100).tolist() for k in keys for e in range(3)]

    found = orders()
    assert all(sorted(order) == list(range(100)) for order in found)
    assert len({tuple(order) for order in [*found, range(100)]}) == 7
    with jax.enable_x64(True):
        assert orders() == found


def test_orders_are_uniformly_random():
    order_of = partial(epoch_permutation, ROOT, size=6)
    orders = np.asarray(jax.vmap(order_of)(jnp.arange(1_200)))
    counts, expected = np.stack([np.sum(orders == n, axis=0) for n in range(6)]), 1_200 / 6
    assert np.sum((counts - expected) ** 2 / expected) < 52.6  # χ², 25 degrees, p = 0.001
