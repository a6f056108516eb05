"""The digits that need no download."""

import sys

import numpy as np
import pytest

from mnist_jax.data import digits, load_dataset
from mnist_jax.errors import DataError

sklearn_datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def splits():
    return digits.load()


def test_all_1797_digits_in_file_order(splits):
    train, test = splits
    assert train.image.shape == (1_437, 28, 28, 1)
    assert test.image.shape == (360, 28, 28, 1)
    assert train.image.dtype == np.uint8
    labels = np.concatenate([train.label, test.label])
    np.testing.assert_array_equal(labels, sklearn_datasets.load_digits().target)
    assert np.bincount(test.label, minlength=10).min() >= 30  # every digit is tested


def test_they_sit_in_mnists_box_and_use_its_range(splits):
    for split in splits:
        border = split.image.copy()
        border[:, 4:24, 4:24] = 0
        assert not border.any()
        assert split.image.max() == 255
        assert 20 < split.image.mean() < 60  # MNIST's is 33


def test_enlarging_keeps_the_picture(splits):
    """Averaged back over its 2.5x2.5 pixels, each cell has the ink it had."""
    small = sklearn_datasets.load_digits().images[:1_437] * (255 / 16)
    box = splits[0].image[:, 4:24, 4:24, 0].repeat(2, 1).repeat(2, 2)  # (n, 40, 40)
    back = box.reshape(-1, 8, 5, 8, 5).mean((2, 4))
    assert np.corrcoef(back.ravel(), small.ravel())[0, 1] > 0.98


def test_the_cache_spares_scikit_learn(data_dir, monkeypatch):
    first = load_dataset("digits", data_dir=data_dir)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    again = load_dataset("digits", data_dir=data_dir)
    np.testing.assert_array_equal(first.train.image, again.train.image)
    np.testing.assert_array_equal(first.test.label, again.test.label)
    assert (first.source, first.notices) == ("the digits bundled with scikit-learn", ())
    assert again.source.startswith("decoded cache")
    assert again.class_names == tuple("0123456789")


def test_without_scikit_learn_the_error_says_so(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn, which is not installed"):
        load_dataset("digits", data_dir=data_dir)
