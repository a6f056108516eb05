"""The batches of an epoch: each example once, in a random order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mnist_jax.data.batches import num_batches, take_batch
from mnist_jax.steps import epoch_permutation

ROOT = jax.random.key(0)


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 4), (7, 1)])
def test_an_epoch_visits_every_example_once(size, batch_size):
    split, visited = small.make_split(size, seed=0), []
    order = epoch_permutation(ROOT, 3, size=size)
    split.image[:, 0, 0, 0] = np.arange(size)
    count = num_batches(size, batch_size)
    assert (count - 1) * batch_size < size <= count * batch_size
    for i in range(count):
        batch = jax.device_get(take_batch(split, order, i, batch_size=batch_size))
        assert batch["image"].shape == (batch_size, 28, 28, 1)
        assert np.all(batch["mask"]) or i == count - 1
        index = batch["image"][batch["mask"]][:, 0, 0, 0]
        np.testing.assert_array_equal(batch["label"][batch["mask"]], split.label[index])
        np.testing.assert_array_equal(batch["image"][batch["mask"]], split.image[index])
        visited += index.tolist()
    assert visited == order.tolist()
    assert sorted(visited) == list(range(size))


def test_the_order_is_determined_by_epoch_and_seed():
    def orders():
        keys = [jax.random.key(seed, impl="threefry2x32") for seed in (0, 1)]
        return [epoch_permutation(k, e, size=100).tolist() for k in keys for e in range(3)]

    found = orders()
    assert len({tuple(order) for order in [*found, range(100)]}) == 7
    with jax.enable_x64(True):
        assert orders() == found


def test_orders_are_uniformly_random():
    order_of = partial(epoch_permutation, ROOT, size=6)
    orders = np.asarray(jax.vmap(order_of)(jnp.arange(1_200)))
    counts, expected = np.stack([np.sum(orders == n, axis=0) for n in range(6)]), 1_200 / 6
    assert np.sum((counts - expected) ** 2 / expected) < 52.6  # χ², 25 degrees, p = 0.001
