"""Short trainings on MNIST reach the expected accuracy."""

import pytest

from mnist_jax import Config, fit

pytestmark = pytest.mark.mnist


@pytest.mark.parametrize(
    ("model", "fields", "accuracy"),
    [
        pytest.param("logistic", {"epochs": 2}, 0.91, marks=pytest.mark.campaign),
        ("mlp", {"epochs": 1}, 0.95),
        pytest.param("cnn", {"max_steps": 60}, 0.93, marks=pytest.mark.campaign),
    ],
)
def test_reaches(model, fields, accuracy, mnist_dir, data_dir, tmp_path):
    folders = {"manual_dir": mnist_dir, "data_dir": data_dir, "workdir": tmp_path / "run"}
    record = fit(Config(model=model, dataset="mnist", **folders, **fields)).record
    assert record["test_count"] == 10_000
    assert record["test_accuracy"] >= accuracy
