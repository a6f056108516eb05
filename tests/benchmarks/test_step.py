"""Training steps as the benchmarks call them, on logistic regression and a network of a fork."""

import argparse
import dataclasses

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


def make(mode: str, **changes) -> jobs.Workload:
    job = jobs.Job(model="logistic", mode=mode, **SMALL | changes)
    return ours.make(job, jobs.make_data(job))


def trained(workload: jobs.Workload, steps: int) -> np.ndarray:
    state = workload.train(workload.state, steps)
    return jax.device_get(state.params["logits"]["kernel"])


def test_all_modes_train_on_the_same_batches_to_the_same_parameters():
    expected = trained(make(jobs.MANY), 7)
    assert np.ptp(expected) > 0
    for mode in (jobs.ONE, jobs.HOST):
        np.testing.assert_allclose(trained(make(mode), 7), expected, rtol=0, atol=1e-6)


def test_one_dispatch_a_step_copies_nothing_to_the_device():
    workload = make(jobs.ONE)
    state = workload.train(workload.state, 2)
    with jax.transfer_guard_host_to_device("disallow"):
        jax.block_until_ready(workload.train(state, 7))


@pytest.mark.parametrize(("batch_size", "unit"), [(1, 600), (100, 600), (200, 300)])
def test_on_an_accelerator_a_call_has_no_more_steps_at_a_small_batch(batch_size, unit, monkeypatch):
    for module in (ours, trainer):
        monkeypatch.setattr(module, "dynamic_loop_bound", lambda device: False)
    changes = {"train_size": 60_000, "what": ("eval",)}  # nothing is compiled
    assert make(jobs.MANY, batch_size=batch_size, **changes).unit == unit


def test_a_planted_slow_down_does_a_tenth_of_the_steps_twice():
    workload = make(jobs.MANY, slow_down=0.1, train_size=10_000)
    assert workload.unit == 10
    assert int(workload.train(workload.state, 50).step) == 55


def test_seeds_train_as_many_networks():
    workload = make(jobs.MANY, seeds=3)
    state = workload.train(workload.state, 2)
    assert state.params["logits"]["kernel"].shape == (3, 784, 10)


def test_a_network_of_a_fork_is_measured_and_a_case_that_fails_is_excluded(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    given = launch.DEFAULTS | {"model": ["tiny"], "repeats": 1, "what": ["train"]}
    cases = step.jobs_of(argparse.Namespace(**given))
    cases = [dataclasses.replace(job, **SMALL) for job in cases]
    cases.insert(1, dataclasses.replace(cases[0], devices=99))
    found = results.parse(ours.run([dataclasses.asdict(job) for job in cases]))
    many, one = found.benchmarks
    assert (many.model, many.details["params_bytes"]) == ("tiny", 4 * 20)
    assert many.details["compiled"] in ("afresh", "from the cache")
    assert many.details["program_bytes"] > 500 * 784 and one.mode == "one dispatch a step"
    [(name, why)] = found.context["excluded"].items()
    assert "99 devices" in name and "devices is 99" in why
    times, memory, *_ = step.report(found)
    assert "| train_step | tiny" in times and "| tiny" in memory


@pytest.mark.campaign
def test_launches_are_processes_and_a_trace_counts_the_kernels(tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    words = f"--model logistic --mode many --repeats=1 --launches=2 --trace --output={file}"
    monkeypatch.setattr("sys.argv", ["step", *words.split()])
    flags = f"{launch.CASES} mode launches trace"
    assert launch.main("", step.measure, flags, step.report) == 0
    found = results.read(file)
    assert [b.details["launch"] for b in found.benchmarks] == [0, 0, 1, 1]
    [row] = found.tables["trace"]
    assert 20 < row["kernels_per_step"] < 100
    assert row["layer_shares"]["logits"] > 0.05
    assert sum(row["layer_shares"].values()) == pytest.approx(1)
    assert "kernels a step" in capsys.readouterr().out
