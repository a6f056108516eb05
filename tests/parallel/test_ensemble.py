"""Many seeds in one program: each member is what a run with its seed would be."""

import json
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import rows_of

from mnist_jax import Callback, Dataset, fit, load_dataset, load_run, models
from mnist_jax.config import group_by_point
from mnist_jax.errors import NonFiniteError
from mnist_jax.runs.results import accuracy_line, diverged_warning

MLP = {"model": "mlp", "hidden_sizes": (128,), "epochs": 1}
CNN = {"model": "cnn", "batch_size": 50, "hidden_sizes": (16,), "max_steps": 3, "seeds": 2}
ADAMW = {"optimizer": "adamw", "schedule": "cosine", "epochs": 1}


@pytest.mark.parametrize(
    ("fields", "grid", "same_bits"),
    [
        ({"seeds": 2, "seed": 7}, {}, False),  # under vmap sums round differently
        pytest.param(CNN, {}, True, marks=pytest.mark.campaign),
        ({**MLP, "dropout": 0.3, "ema_decay": 0.9}, {"learning_rate": (0.001, 0.01)}, True),
        (ADAMW, {"learning_rate": (0.1,), "weight_decay": (0.0, 0.1)}, False),
        ({"epochs": 1}, {"weight_decay": [0.0]}, False),
    ],
)
def test_each_member_equals_the_run_of_its_values(config, tmp_path, fields, grid, same_bits):
    together, labels = fit(config(**fields, **grid)), config(**fields, **grid).member_labels()
    record, row = together.record, rows_of(together.workdir)[-1]
    for i, member in enumerate(record["members"]):
        run = fit(config(**fields | {"seeds": None} | member, workdir=tmp_path / str(i)))
        if same_bits:
            assert record["params_sha256"][i] == run.record["params_sha256"]
        for name in ("train/loss", "test/loss"):
            assert row[name][i] == pytest.approx(rows_of(run.workdir)[-1][name], rel=1e-4)
    assert len({*record["params_sha256"]}) == len(record["members"]) == len(labels)
    if grid:
        assert "statistics" not in record  # other recipes have no common mean
        lines, points = accuracy_line(record).splitlines(), group_by_point(record["members"])
        assert [line.partition("), ")[2] for line in lines] == [*points]


def test_the_record_holds_each_member_and_their_statistics(config):
    result = fit(config(seeds=3, validation=100))
    record, rows = json.loads((result.workdir / "result.json").read_text()), rows_of(result.workdir)
    accuracies = record["test_accuracy"]
    assert len(accuracies) == len(set(record["params_sha256"])) == record["seeds"] == 3
    assert accuracies == [correct / 360 for correct in record["test_correct"]]
    assert rows[0]["images_per_s"] * rows[0]["train_s"] == pytest.approx(3 * 1337)
    assert (record["test_count"], record["parameters"]) == (360, 7850)  # of one member
    assert "train_correct" not in record
    found = record["statistics"]["test_accuracy"]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert set(record["statistics"]) == {f"{n}_accuracy" for n in ("train", "validation", "test")}
    assert rows[-1]["test/accuracy"] == accuracies
    assert all(len(rows[0][f"{name}/loss"]) == 3 for name in ("train", "validation", "test"))
    percent = f"{100 * found['mean']:.2f} % mean of 3 seeds, sd {100 * found['sd']:.2f}"
    assert accuracy_line(record) == f"test accuracy: {percent}"
    grid = [{"learning_rate": rate, "seed": seed} for rate in (0.1, 0.2) for seed in (7, 8)]
    values = {"test_correct": [5, 7, 6, 8], "test_count": 10, "seeds": 2, "members": grid}
    found = accuracy_line(values | {"diverged": ["learning_rate 0.1, seed 7"]})
    assert "70.00 % mean of 1 seed, learning_rate 0.1\n" in found
    assert found.endswith("70.00 % mean of 2 seeds, sd 14.14, learning_rate 0.2")


class Fragile(models.LogisticRegression):
    """Multiplies its logits by a parameter that is infinite for about half of the seeds."""

    @nn.compact
    def __call__(self, x, *, train=False):
        scale = self.param("scale", lambda key: 1 / jax.random.bernoulli(key).astype(jnp.float32))
        return super().__call__(x) * scale


def test_a_member_that_diverges_is_excluded_and_if_all_do_the_run_ends(config, monkeypatch):
    with pytest.raises(NonFiniteError, match="at step 3 "):  # of the last one
        fit(config(learning_rate=(1e38, 5e34), workdir=config().workdir.with_name("all")))
    monkeypatch.setitem(models.MODELS, "fragile", Fragile)
    watch = mock.create_autospec(Callback, instance=True)
    result = fit(config(model="fragile", seeds=6, steps_per_call=5), callbacks=[watch])
    record, row = result.record, rows_of(result.workdir)[0]
    warnings = [call.args[0] for call in watch.on_warning.call_args_list]
    diverged = [int(label.removeprefix("seed ")) for label in record["diverged"]]
    assert 0 < len(diverged) < 6
    assert [loss is None for loss in row["train/loss"]] == [1234 + i in diverged for i in range(6)]
    assert {type(params["scale"]) for params, _ in load_run(result.workdir).members} == {np.ndarray}
    (warning,) = record["warnings"]
    assert warnings == [warning] and f"seed {diverged[0]}" in warning
    assert record["statistics"]["test_accuracy"]["n"] == 6 - len(diverged)
    lists = [diverged_warning(list(names)).partition(": ")[2] for names in ("abc", "abcde")]
    assert lists == ["a; b; c", "a; b; c and 2 more"]
    late = {"optimizer": "sgd", "max_steps": 1, "workdir": config().workdir / "grid"}
    result = fit(config(learning_rate=[0.1, 3e38], **late), callbacks=[watch])
    [good, bad] = accuracy_line(result.record).splitlines()
    assert bad.endswith(" diverged, learning_rate 3e+38") and "diverged" not in good
    assert "learning_rate 3e+38" in watch.on_warning.call_args.args[0]
    assert "NaN" not in (result.workdir / "metrics.jsonl").read_text()


def test_no_decision_reads_the_test_images(config, tmp_path):
    fields = {"schedule": "onecycle", "ema_decay": 0.9, "validation": 100, "seeds": 2}
    plain = fit(config(**fields)).record
    assert [name[:5] for name in plain["statistics"]] == ["train", "valid", "test_"]
    data = load_dataset("digits", data_dir=config().data_dir)
    label = np.random.default_rng(0).permutation(data.test.label)
    data = Dataset.from_arrays("permuted", *data.train, data.test.image, label)
    permuted = fit(config(workdir=tmp_path / "permuted", **fields), dataset=data).record
    assert permuted["test_accuracy"] != plain["test_accuracy"]
    assert permuted["params_sha256"] == plain["params_sha256"]
