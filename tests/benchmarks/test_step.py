"""Training steps as the benchmarks call them, on logistic regression and a network of a fork."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import launch, results, roofline, step
from benchmarks.results import Benchmark, Results
from benchmarks.workers import job as jobs
from benchmarks.workers import ours

SMALL = {"train_size": 500, "test_size": 250, "samples": 1, "budget_s": 0.0, "min_sample_s": 0.0}
FORK = """
import flax.linen as nn
import jax.numpy as jnp
from mnist_jax import MODELS
from mnist_jax.models import LogisticRegression

class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train, mask):
        x = nn.Conv(self.width, (5, 5), strides=2)(x)  # (batch, 14, 14, 4)
        norm = nn.BatchNorm(use_running_average=not train)
        return nn.LayerNorm()(norm(x, mask=mask[:, None, None, None]))

class Tiny(LogisticRegression):
    width: int = 9

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        mask = jnp.ones(len(x), bool) if mask is None else mask
        x = Block(self.width, name="block")(x, train, mask).mean(axis=(1, 2))
        x = nn.Dense(self.num_classes, name="only")(x)
        return x @ jnp.ones((10, 10))

MODELS["tiny"] = Tiny
"""


def make(mode: str, **changes) -> jobs.Workload:
    job = jobs.Job(model="logistic", mode=mode, **SMALL | changes)
    return ours.make(job, jobs.make_data(job))


def trained(workload: jobs.Workload, *samples: int) -> np.ndarray:
    state = workload.state
    for steps in samples:
        state = workload.train(state, steps)
    return jax.device_get(state.params["logits"]["kernel"])


def test_all_modes_train_on_the_same_batches_to_the_same_parameters():
    expected = trained(make(jobs.MANY), 7)
    assert np.ptp(expected) > 0
    for mode in (jobs.MANY, jobs.ONE, jobs.HOST):  # a sample begins where the last one ended
        np.testing.assert_allclose(trained(make(mode), 3, 4), expected, rtol=0, atol=1e-6)


def test_one_dispatch_a_step_copies_nothing_to_the_device():
    workload = make(jobs.ONE)
    state = workload.train(workload.state, 2)
    with jax.transfer_guard_host_to_device("disallow"):
        jax.block_until_ready(workload.train(state, 7))


def test_a_planted_slow_down_does_a_tenth_of_the_steps_of_several_networks_twice():
    workload = make(jobs.MANY, slow_down=0.1, train_size=10_000, seeds=3)
    assert workload.unit == 10
    state = workload.train(workload.state, 50)
    assert state.step.tolist() == [55, 55, 55]
    assert state.params["logits"]["kernel"].shape == (3, 784, 10)


def test_a_network_of_a_fork_is_measured_and_a_case_that_fails_is_excluded(tmp_path):
    (tmp_path / "tiny.py").write_text(FORK)
    given = launch.DEFAULTS | {"model": ["tiny"], "repeats": 1, "what": ["train"], "trace": True}
    fork = {"fork": f"{tmp_path}/tiny.py", "options": ["width=4"]}
    options = argparse.Namespace(**given | fork)
    cases = [dataclasses.replace(job, **SMALL) for job in step.jobs_of(options)]
    cases.insert(1, dataclasses.replace(cases[0], devices=99))
    found = results.parse(ours.run([dataclasses.asdict(job) for job in cases]))
    found.context.update(platform="cpu", device="NVIDIA H100 80GB HBM3")  # by its name alone
    many, one = found.benchmarks
    sizes = 5 * 5 * 4 + 4 + 2 * 4 + 2 * 4 + 5 * 10
    assert (many.model, many.details["params_bytes"]) == ("tiny", 4 * sizes)
    assert many.details["compiled"] in ("afresh", "from the cache")
    assert many.details["program_bytes"] > 500 * 784 and one.mode == "one dispatch a step"
    [(name, why)] = found.context["excluded"].items()
    assert "99 devices" in name and "devices is 99" in why
    times, memory, *_ = step.report(found)
    assert "| train_step | tiny" in times and "| tiny" in memory
    rates = {roofline.PRODUCT: 1e9, roofline.COPY: 1e6}
    roof = [Benchmark(name=n, samples_s=[1.0], details={"amount": rates[n]}) for n in rates]
    found = Results(found.context, [*found.benchmarks, *roof], found.tables)
    [shares] = [row["layer_shares"] for row in found.tables["trace"]]
    row = roofline.account(cases[0], found.cases(mode=many.mode)[0], found, shares)
    parts = {part["part"]: part for part in row["parts"]}
    assert list(parts) == ["a step", "block", "only", roofline.REST]
    assert parts["block"]["flops"] == 2 * 2 * 100 * 14 * 14 * 4 * 25  # no gradient of the images
    assert parts["only"]["flops"] == 3 * 2 * 100 * 4 * 10
    assert parts[roofline.REST]["flops"] == 3 * 2 * 100 * 10 * 10
    assert parts["block"]["seconds"] > 0
    rate = parts["a step"]["direct_flops"] / many.samples_s[0]
    assert (row["of_matrix_rate"], row["mfu"]) == pytest.approx((rate / 1e9, rate / 66.9e12))
    assert parts["a step"]["seconds"] == many.samples_s[0]


def test_a_step_of_several_networks_has_the_images_of_all_and_evaluation_is_measured_once():
    several = Benchmark(name="train_step", samples_s=[0.1], batch_size=100, mode="16 networks")
    assert " 16,000 |" in step.report(Results({"platform": "cpu"}, [several], {}))[0]
    options = argparse.Namespace(**launch.DEFAULTS | {"model": ["mlp"], "what": ["train", "eval"]})
    assert [job.what for job in step.jobs_of(options)] == [["train", "eval"], ["train"]]
