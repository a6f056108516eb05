"""Short trainings on MNIST reach the expected accuracy."""

import pytest

from mnist_jax import Config, fit
from mnist_jax.runs.run_dir import read_result

pytestmark = pytest.mark.mnist


def test_an_mlp_learns_in_an_epoch(mnist_mlp):
    record = read_result(mnist_mlp)
    assert record["test_count"] == 10_000
    assert record["test_accuracy"] >= 0.95


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("model", "fields", "accuracy"),
    [("logistic", {"epochs": 2}, 0.91), ("cnn", {"max_steps": 60}, 0.93)],
)
def test_reaches(model, fields, accuracy, mnist_dir, data_dir, tmp_path):
    folders = {"manual_dir": mnist_dir, "data_dir": data_dir, "workdir": tmp_path / "run"}
    record = fit(Config(model=model, dataset="mnist", **folders, **fields)).record
    assert record["test_accuracy"] >= accuracy
