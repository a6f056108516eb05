"""Steps timed in this process and in others, and what cannot be timed."""

import sys
from pathlib import Path

import jax
import pytest

from benchmarks import launch, memory, results, step
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from mnist_jax.parallel import mesh as devices
from mnist_jax.reporting import profiling


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["step", *words])
    status = launch.command(step.Options, step.measure, "step", "")
    return status, *capsys.readouterr()


def test_every_case_is_timed(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    words = ["--model", "logistic", "--batch_size", "3", "10", "--repeats=2", f"--output={file}"]
    status, out, _ = run(monkeypatch, capsys, *words)
    assert status == 0
    found = results.read(file).benchmarks
    assert [(b.name, b.batch_size, b.mode) for b in found] == [
        (step.TRAIN, 3, ours.MANY),
        (step.EVALUATION, 3, ours.MANY),
        (step.TRAIN, 3, ours.ONE),
        (step.TRAIN, 10, ours.MANY),
        (step.EVALUATION, 10, ours.MANY),
        (step.TRAIN, 10, ours.ONE),
    ]
    assert all(len(b.samples_s) == 2 for b in found)
    assert found[0].details["peak_bytes"] > found[0].details["program_bytes"] > 47e6
    assert "images/s" in out


def test_a_step_can_be_spread_over_devices(tmp_path: Path):
    file = tmp_path / "step.json"
    words = ["--model=logistic", "--repeats=2", "--devices=all"]
    variables = {**launch.ON_CPU, "JAX_NUM_CPU_DEVICES": "2"}
    python = Path(sys.executable)
    launch.run(python, ["-m", "benchmarks.step", *words, f"--output={file}"], variables)
    found = [(b.name, b.mode.removesuffix(", 2 devices")) for b in results.read(file).benchmarks]
    assert found == [(step.TRAIN, ours.MANY), (step.EVALUATION, ours.MANY), (step.TRAIN, ours.ONE)]


def test_launches_are_processes_of_their_own(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    words = ["--model=logistic", "--what=train", "--mode=many", "--launches=2", "--repeats=2"]
    assert run(monkeypatch, capsys, *words, f"--output={file}")[0] == 0
    found = results.read(file).benchmarks
    assert [b.details["launch"] for b in found] == [0, 1]
    [both] = step.grouped(found)
    assert both.samples_s == [b.median_s for b in found]


def test_what_does_not_fit_is_left_out_and_the_rest_goes_on(tmp_path: Path, monkeypatch, capsys):
    small = jobs.Job(model="logistic", mode=ours.MANY, batch_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "memory_bytes", lambda device: None)
        workload = ours.make(small, jobs.make_data(small))
    room = ours.needed_bytes(workload.analysis) + 10_000
    monkeypatch.setattr(devices, "memory_bytes", lambda device: room)
    file = tmp_path / "step.json"
    words = ["--model=logistic", "--what=train", "--batch_size", "100000", "10", "--repeats=1"]
    status, out, _ = run(monkeypatch, capsys, *words, "--mode=many", f"--output={file}")
    assert (status, "out of memory" in out) == (0, True)
    found = results.read(file)
    assert [b.batch_size for b in found.benchmarks] == [10]
    assert list(found.context["left_out"]) == ["logistic, batch 100000, float32, many steps a call"]


def test_a_precision_that_the_device_lacks_is_left_out(monkeypatch, capsys):
    words = ["--model=logistic", "--what=train", "--precision=tf32", "--platform=cpu"]
    status, out, _ = run(monkeypatch, capsys, *words)
    assert (status, "which this device (cpu) does not have" in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--model=resnet"], 2, "resnet"),
        (["--batch_size=0"], 2, "batch_size is 0; allowed is 1 or more"),
        (["--devices=9999"], 6, "devices is 9999; JAX finds"),
        (["--output=/proc/step.json"], 6, "cannot write /proc/step.json"),
        (["--profile=/proc/trace", "--model=logistic"], 6, "cannot write /proc/trace"),
    ],
)
def test_mistakes_are_answered_before_anything_is_measured(
    words, status, message, monkeypatch, capsys
):
    monkeypatch.setattr(step, "time_job", lambda *_: pytest.fail("it measured"))
    found, _, err = run(monkeypatch, capsys, *words)
    assert (found, err.count("\n"), message in err) == (status, 1, True)


def test_a_step_can_be_profiled(tmp_path: Path, monkeypatch, capsys):
    words = ["--model=logistic", "--what=train", "--mode=many", "--repeats=1", "--traced_steps=7"]
    status, out, _ = run(monkeypatch, capsys, *words, f"--profile={tmp_path / 'trace'}")
    assert status == 0
    assert "costliest operations" in out
    assert {found.times % 7 for found in profiling.costliest(tmp_path / "trace")} == {0}
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_both_modes_train_alike():
    after = []
    for mode in (ours.MANY, ours.ONE):
        job = jobs.Job(model="logistic", mode=mode, train_size=300)
        workload = ours.make(job, jobs.make_data(job))
        after.append(jax.device_get(workload.train(workload.state, 7)))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, after), strict=True))


def test_memory_is_counted_by_hand():
    found = memory.counted(jobs.Job(model="mlp", batch_size=7))
    assert found["params_bytes"] == 4 * 244_522
    assert found["optimizer_bytes"] == 8 * 244_522 + 4  # two moments and a counter
    assert found["activations_bytes"] == 4 * 7 * (784 + 256 + 128 + 64 + 32 + 10)
    half = memory.counted(jobs.Job(model="mlp", batch_size=7, precision="bfloat16"))
    assert 2 * half["activations_bytes"] == found["activations_bytes"]
