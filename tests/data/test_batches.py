"""The order of an epoch: each example once. The batches: see test_steps.py."""

import jax

from mnist_jax.steps import epoch_permutation


def test_the_order_is_determined_by_epoch_and_seed():
    def orders():
        keys = [jax.random.key(seed, impl="threefry2x32") for seed in (0, 1)]
        return [epoch_permutation(k, e, size=100).tolist() for k in keys for e in range(3)]

    found = orders()
    assert all(sorted(order) == list(range(100)) for order in found)
    assert len({tuple(order) for order in [*found, range(100)]}) == 7
    with jax.enable_x64(True):
        assert orders() == found
