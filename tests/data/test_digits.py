"""The digits that need no download."""

import numpy as np
import pytest

from mnist_jax.data import digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_all_1797_digits_in_file_order_in_the_format_of_mnist():
    train, test = splits = digits.load()
    assert (train.image.shape, test.image.shape) == ((1_437, 28, 28, 1), (360, 28, 28, 1))
    labels = np.concatenate([train.label, test.label])
    np.testing.assert_array_equal(labels, sklearn_datasets.load_digits().target)
    assert np.bincount(test.label, minlength=10).min() >= 30  # every class is tested
    for split in splits:
        border = split.image.copy()
        border[:, 4:24, 4:24] = 0
        assert (split.image.dtype, split.image.max(), border.max()) == (np.uint8, 255, 0)
        assert 20 < split.image.mean() < 60  # MNIST: 33
    # Averaged back over its 2.5 × 2.5 pixels, each original pixel has its value.
    original = sklearn_datasets.load_digits().images[:1_437]
    box = train.image[:, 4:24, 4:24, 0].repeat(2, 1).repeat(2, 2)  # (n, 40, 40)
    back = box.reshape(-1, 8, 5, 8, 5).mean((2, 4))
    assert np.corrcoef(back.ravel(), original.ravel())[0, 1] > 0.98
