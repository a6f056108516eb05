import dataclasses
import os
import sys
from pathlib import Path

import pytest

from benchmarks import launch, peers, results, startup
from benchmarks.peer_workers import job
from benchmarks.peer_workers.job import Job
from benchmarks.results import Benchmark
from mnist_jax.config import Config
from mnist_jax.errors import UsageError
from mnist_jax.models import MODELS
from mnist_jax.trainer import EVAL_BATCH_SIZE

OURS = peers.OURS[:2]


def entry(framework: str, mode: str, number: int, *samples_s: float) -> Benchmark:
    return Benchmark.of(
        samples_s,
        name="train_step",
        framework=framework,
        mode=mode,
        model="mlp",
        batch_size=100,
        precision="float32",
        details={"round": number, "others_share": None, "peak_rss_bytes": 10**6 * (number + 1)},
    )


def test_all_frameworks_do_what_a_run_does():
    assert job.EVAL_BATCH_SIZE == EVAL_BATCH_SIZE
    assert Job(model="mlp").batch_size == Config().batch_size
    for name, sizes in job.HIDDEN_SIZES.items():
        model, config = MODELS[name](), Config(model=name)
        assert tuple(getattr(model, "hidden_sizes", ())) == sizes
        assert getattr(model, "dropout", 0.0) == (job.DROPOUT if name == "cnn" else 0.0)
        assert config.learning_rate == job.LEARNING_RATE


def test_ratios_are_taken_within_a_round():
    # The second round runs on a machine half as fast: no ratio may notice.
    benchmarks = [
        entry(*OURS, 0, 1.0, 9.0, 1.0),
        entry("pytorch", "eager", 0, 2.0),
        entry("pytorch", "eager", 1, 4.0),
        entry(*OURS, 1, 2.0),
        entry(*OURS, 2, 1.5),
        entry("pytorch", "eager", 2, 2.0),
        entry(*OURS, 3, 1.0),  # a round in which the peer failed
    ]
    ours, peer = peers.rows(benchmarks)
    assert (ours.ratio, ours.lowest, ours.highest) == (1, 1, 1)
    assert ours.median_s == 1.25
    assert (peer.ratio, peer.lowest, peer.highest) == (0.5, 0.5, 0.75)
    assert peer.median_s == 2.0
    assert peer.peak_rss_bytes == 3 * 10**6


def test_a_worker_of_ours_answers_with_its_samples_and_peak_memory():
    job = Job(
        model="logistic", train_size=300, test_size=600, samples=3, min_sample_s=0.01, warmup_s=0.1
    )
    module = "benchmarks.peer_workers.ours"
    answer = launch.ask(Path(sys.executable), module, dataclasses.asdict(job)).output
    for what in ("train", "eval"):
        assert len(answer[what]["samples_s"]) == 3
        assert all(sample > 0 for sample in answer[what]["samples_s"])
        assert answer[what]["warmup_s"]
    assert answer["peak_rss_bytes"] > 10**7
    assert answer["context"]["jax"]


@pytest.fixture
def no_frameworks(tmp_path: Path) -> Path:
    """An interpreter that has NumPy, and neither PyTorch nor Keras."""
    python = tmp_path / "python"
    hide = "import sys; sys.modules.update(torch=None, keras=None, tensorflow=None)"
    (tmp_path / "sitecustomize.py").write_text(hide)
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return python


def test_frameworks_that_are_not_installed_are_named_and_left_out(
    no_frameworks: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr(peers, "Job", small_job)
    options = peers.Options(
        output=tmp_path / "peers.json",
        models=("logistic",),
        rounds=1,
        what=("train",),
        frameworks=("pytorch", "keras"),
        peers_python=no_frameworks,
    )
    peers.measure(options)
    context, benchmarks, _ = results.read(options.output)
    assert {b.framework for b in benchmarks} == {"mnist_jax"}
    assert {who.split()[0] for who in context["left_out"]} == {"pytorch", "keras"}
    out = capsys.readouterr().out
    assert "torch" in context["left_out"]["pytorch (eager)"]
    assert "left out: keras (jit_compile=True)" in out
    assert "many steps a call" in out


def small_job(**fields) -> Job:
    small = {"train_size": 300, "test_size": 300, "samples": 2, "budget_s": 0.1, "warmup_s": 0.1}
    return Job(**{**fields, **small})


def test_startup_measures_phases_and_the_job(
    no_frameworks: Path, tmp_path: Path, data_dir: Path, capsys
):
    options = startup.Options(
        output=tmp_path / "startup.json",
        rounds=1,
        models=("logistic",),
        dataset="digits",
        data_dir=data_dir,
        epochs=1,
        peers_python=no_frameworks,
    )
    startup.measure(options)
    context, benchmarks, _ = results.read(options.output)
    names = {(b.name, b.mode) for b in benchmarks}
    assert names == {(n, m) for n in (*startup.PHASES, "job") for m in ("cold cache", "warm cache")}
    assert list(context["left_out"]) == ["keras"]
    assert "left out: keras" in capsys.readouterr().out


def test_bad_options_are_refused(tmp_path: Path):
    output = tmp_path / "peers.json"
    with pytest.raises(UsageError, match="rounds is 0; allowed is 1 or more"):
        peers.Options(output=output, rounds=0)
    with pytest.raises(UsageError, match="no Python at"):
        startup.Options(output=output, peers_python=tmp_path / os.devnull[1:])
