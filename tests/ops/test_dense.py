"""The matrix product of a dense layer."""

import numpy as np
from jax import lax

from mnist_jax.ops.dense import dot_general


def test_products_of_other_axes_are_xlas_own():
    x, kernel = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    for contracted in (((1,), (0,)), ((0,), (0,)), ((1,), (1,))):
        expected = lax.dot_general(x, kernel, (contracted, ((), ())))
        found = dot_general(x, kernel, (contracted, ((), ())))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
