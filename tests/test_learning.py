"""Short trainings on real MNIST reach what they should."""

import pytest

from mnist_jax import Config, fit

pytestmark = pytest.mark.mnist


@pytest.mark.parametrize(
    ("model", "fields", "bar"),
    [
        ("logistic", {"epochs": 2}, 0.91),
        ("mlp", {"epochs": 1}, 0.95),
        ("cnn", {"max_steps": 60}, 0.93),
    ],
)
def test_reaches(model, fields, bar, mnist_dir, data_dir, tmp_path):
    where = {"manual_dir": mnist_dir, "data_dir": data_dir, "workdir": tmp_path / "run"}
    record = fit(Config(model=model, dataset="mnist", **where, **fields)).record
    assert record["test_count"] == 10_000
    assert record["test_accuracy"] >= bar
