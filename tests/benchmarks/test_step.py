"""Training steps as the benchmarks call them, on logistic regression and a network of a fork."""

import argparse

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks import launch, results, step
from benchmarks.workers import job as jobs
from benchmarks.workers import ours
from mnist_jax import trainer
from mnist_jax.models import MODELS

SMALL = {"train_size": 500, "test_size": 250, "samples": 1, "budget_s": 0.0, "min_sample_s": 0.0}


class Tiny(nn.Module):
    """A network of a fork."""

    num_classes: int = 10
    dtype: object = None

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.num_classes, name="only")(x.mean(axis=(1, 2)))


def options(**changes) -> argparse.Namespace:
    values = {name: flag.get("default", False) for name, flag in launch.FLAGS.items()}
    return argparse.Namespace(**values | {"model": ["logistic"], "repeats": 1} | changes)


def make(mode: str, **changes) -> jobs.Workload:
    job = jobs.Job(model="logistic", mode=mode, **SMALL | changes)
    return ours.make(job, jobs.make_data(job))


def trained(workload: jobs.Workload, steps: int) -> np.ndarray:
    state = workload.train(workload.state, steps)
    return jax.device_get(state.params["logits"]["kernel"])


def test_all_modes_train_on_the_same_batches_to_the_same_parameters():
    expected = trained(make(ours.MANY), 7)
    assert np.ptp(expected) > 0
    for mode in (ours.ONE, ours.HOST):
        np.testing.assert_allclose(trained(make(mode), 7), expected, rtol=0, atol=1e-6)


def test_one_dispatch_a_step_copies_nothing_to_the_device():
    workload = make(ours.ONE)
    state = workload.train(workload.state, 2)
    with jax.transfer_guard_host_to_device("disallow"):
        jax.block_until_ready(workload.train(state, 7))


@pytest.mark.parametrize(("batch_size", "unit"), [(1, 600), (100, 600), (200, 300)])
def test_on_an_accelerator_a_call_has_no_more_steps_at_a_small_batch(batch_size, unit, monkeypatch):
    for module in (ours, trainer):
        monkeypatch.setattr(module, "dynamic_loop_bound", lambda device: False)
    changes = {"train_size": 60_000, "what": ("eval",)}  # nothing is compiled
    assert make(ours.MANY, batch_size=batch_size, **changes).unit == unit


def test_a_planted_slow_down_does_a_tenth_of_the_steps_twice():
    workload = make(ours.MANY, slow_down=0.1, train_size=10_000)
    assert workload.unit == 10
    assert int(workload.train(workload.state, 50).step) == 55


def test_seeds_train_as_many_networks():
    workload = make(ours.MANY, seeds=3)
    state = workload.train(workload.state, 2)
    assert state.params["logits"]["kernel"].shape == (3, 784, 10)


def test_a_network_of_a_fork_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    file = tmp_path / "step.json"
    step.measure(options(model=["tiny"], mode=["many", "one"], what=["train"], output=file))
    many, one = results.read(file).benchmarks
    assert (many.model, many.details["params_bytes"]) == ("tiny", 4 * 20)
    assert many.details["compiled"] in ("afresh", "from the cache")
    # The process's peak of memory is that of its first case alone.
    assert many.details["peak_bytes"] > 1e8 and one.details["peak_bytes"] is None
    assert "| train_step | tiny" in capsys.readouterr().out


@pytest.mark.campaign
def test_launches_are_processes_and_a_trace_counts_the_kernels(tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    words = f"--model logistic --mode many --repeats=1 --launches=2 --trace --output={file}"
    monkeypatch.setattr("sys.argv", ["step", *words.split()])
    assert launch.main("", step.measure, step.FLAGS) == 0
    found = results.read(file)
    assert [b.details["launch"] for b in found.benchmarks] == [0, 0, 1, 1]
    [row] = found.tables["trace"]
    assert 20 < row["kernels_per_step"] < 100
    assert row["layer_shares"]["logits"] > 0.05
    assert sum(row["layer_shares"].values()) == pytest.approx(1)
    assert "kernels a step" in capsys.readouterr().out
