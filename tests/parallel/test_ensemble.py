"""Many seeds in one program: each member is what a run with its seed would be."""

import dataclasses
import json
import signal
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_jax import Config, fit, models, training
from mnist_jax.callbacks import Callback
from mnist_jax.errors import InterruptedRunError, NonFiniteError
from mnist_jax.parallel.ensemble import over_members
from mnist_jax.runs.results import accuracy_line
from mnist_jax.signals import Stop


@pytest.fixture
def config(data_dir, tmp_path):
    def make(**fields) -> Config:
        defaults = {"model": "logistic", "dataset": "digits", "epochs": 2, "data_dir": data_dir}
        return Config(**{**defaults, "workdir": tmp_path / "run", **fields})

    return make


def rows_of(result) -> list[dict]:
    return list(map(json.loads, (result.workdir / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("sequential", [True, False])
def test_over_members_maps_the_stacked_arguments_and_shares_the_others(sequential):
    x, y = np.arange(6.0).reshape(3, 2), np.array([1.0, 10.0])
    together = over_members(lambda x, y: (x * y, x.sum()), [True, False], sequential=sequential)
    product, total = jax.jit(together)(x, y)
    np.testing.assert_array_equal(product, x * y)
    np.testing.assert_array_equal(total, x.sum(1))


@pytest.mark.parametrize(
    ("fields", "same_bits"),
    [
        ({"model": "mlp", "hidden_sizes": (128,), "dropout": 0.3, "epochs": 1}, True),
        ({"model": "logistic"}, False),  # under vmap sums round differently
        pytest.param(
            {"model": "cnn", "batch_size": 50, "hidden_sizes": (16,), "max_steps": 3},
            True,
            marks=pytest.mark.campaign,
        ),
    ],
)
def test_each_member_equals_the_run_of_its_seed(config, tmp_path, fields, same_bits):
    together = fit(config(seeds=2, seed=7, **fields))
    alone = [fit(config(seed=n, workdir=tmp_path / f"{n}", **fields)) for n in (7, 8)]
    if same_bits:
        digests = [run.record["params_sha256"] for run in alone]
        assert together.record["params_sha256"] == digests
    for name in ("train/loss", "test/loss"):
        each = [rows_of(run)[-1][name] for run in alone]
        np.testing.assert_allclose(rows_of(together)[-1][name], each, rtol=1e-4)


def test_the_record_holds_each_member_and_their_statistics(config):
    result = fit(config(seeds=3, validation=100))
    record, rows = json.loads((result.workdir / "result.json").read_text()), rows_of(result)
    accuracies = record["test_accuracy"]
    assert len(accuracies) == len(set(record["params_sha256"])) == record["seeds"] == 3
    assert accuracies == [correct / 360 for correct in record["test_correct"]]
    found = record["statistics"]["test_accuracy"]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert set(record["statistics"]) == {f"{n}_accuracy" for n in ("train", "validation", "test")}
    assert rows[-1]["test/accuracy"] == accuracies
    assert all(len(rows[0][f"{name}/loss"]) == 3 for name in ("train", "validation", "test"))
    percent = f"{100 * found['mean']:.2f} % mean of 3 seeds, sd {100 * found['sd']:.2f}"
    assert accuracy_line(record) == f"test accuracy: {percent}"


class StopAfter(Callback):
    """Stops a run after so many calls."""

    def __init__(self, calls: int):
        self.stop, self.calls = Stop(), calls

    def on_chunk_end(self, *_):
        self.calls -= 1
        if self.calls == 0:
            self.stop.signal = signal.SIGTERM


def test_an_ensemble_resumed_again_and_again_ends_as_one_that_was_not(config, tmp_path):
    fields = {"seeds": 2, "steps_per_call": 7}
    whole = fit(config(workdir=tmp_path / "whole", **fields)).record
    for _ in range(3):
        watch = StopAfter(calls=2)
        with pytest.raises(InterruptedRunError):
            fit(config(**fields), callbacks=[watch], stop=watch.stop)
    record = fit(config(**fields)).record
    for name in ("params_sha256", "test_correct"):
        assert record[name] == whole[name]


class Fragile(nn.Module):
    """Multiplies its logits by a parameter that is infinite for about half of the seeds."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, *, train=False):
        scale = self.param("scale", lambda key: 1 / jax.random.bernoulli(key).astype(jnp.float32))
        return nn.Dense(10)(x.reshape(len(x), -1)) * scale


class Listener(Callback):
    def __init__(self):
        self.warnings = []

    def on_warning(self, message):
        self.warnings.append(message)


def test_a_member_that_diverges_is_named_and_excluded(config, monkeypatch):
    monkeypatch.setitem(models.MODELS, "fragile", Fragile)
    listener = Listener()
    result = fit(config(model="fragile", seeds=6, steps_per_call=5), callbacks=[listener])
    record, row = result.record, rows_of(result)[0]
    diverged = record["diverged_seeds"]
    assert 0 < len(diverged) < 6
    assert [loss is None for loss in row["train/loss"]] == [
        seed in diverged for seed in range(1234, 1240)
    ]
    assert record["warnings"] == listener.warnings
    assert [int(warning.split()[1]) for warning in listener.warnings] == diverged
    assert record["statistics"]["test_accuracy"]["n"] == 6 - len(diverged)
    assert "NaN" not in (result.workdir / "metrics.jsonl").read_text()


def test_if_every_member_diverges_the_run_ends(config):
    with pytest.raises(NonFiniteError, match="at step 2 "):
        fit(config(seeds=2, learning_rate=1e38))


def test_no_decision_reads_the_test_images(config, tmp_path, monkeypatch):
    """Other test labels, the same parameters, bit for bit."""
    fields = {"schedule": "onecycle", "ema_decay": 0.9, "validation": 100, "seeds": 2}
    plain, load = fit(config(**fields)).record, training.load_dataset

    def permuted(*args, **kwargs):
        dataset = load(*args, **kwargs)
        label = np.random.default_rng(0).permutation(dataset.test.label)
        return dataclasses.replace(dataset, test=dataset.test._replace(label=label))

    monkeypatch.setattr(training, "load_dataset", permuted)
    record = fit(config(workdir=tmp_path / "permuted", **fields)).record
    assert record["test_accuracy"] != plain["test_accuracy"]
    assert record["params_sha256"] == plain["params_sha256"]
