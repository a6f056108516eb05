"""The parts of the suite that count rather than time, and all of it in its shortest form."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as suite
from benchmarks import batch_size, card, input, launch, ledger, lowering, results, time_to_accuracy
from benchmarks.peer_workers import accounts
from benchmarks.results import Benchmark
from mnist_jax import Config, fit
from mnist_jax.errors import UsageError
from mnist_jax.reporting import profiling
from mnist_jax.training import Callback


def sweep(*times_s: float) -> list[Benchmark]:
    fields = {"name": "train_step", "framework": "mnist_jax", "model": "mlp", "mode": "many"}
    return [
        Benchmark.of([s], batch_size=2**i, precision="float32", details={}, **fields)
        for i, s in enumerate(times_s)
    ]


def test_where_throughput_saturates():
    assert batch_size.saturation(sweep(1, 1, 1, 1.9)) == 4  # 1, 2, 4 and 4.2 images a second
    assert batch_size.saturation(sweep(1, 1, 1, 1.5)) == 8
    assert batch_size.saturation(sweep(1, 2, 4, 8)) == 1


def test_from_which_batch_on_the_second_platform_wins():
    first = sweep(1, 1, 1, 1)
    assert batch_size.crossover(first, sweep(0.5, 2, 0.9, 0.9)) == 4
    assert batch_size.crossover(first, sweep(2, 2, 2, 2)) is None
    assert batch_size.crossover(first, sweep(0.1, 0.1)) == 1


def test_a_part_takes_the_clock_of_the_one_around_it(monkeypatch):
    now = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    found = accounts.Accounts(9.0, "start")
    found.turn_to("run")
    now = 11.0
    with found.part("call"):
        now = 13.0
        with found.part("compile"):
            now = 17.0
        now = 18.0
    now = 20.0
    found.turn_to("end")
    assert found.seconds == {"start": 1.0, "run": 3.0, "call": 3.0, "compile": 4.0}


def test_a_ledger_closes_unless_a_part_is_missing_or_doubled():
    row = {"wall_s": 10.0, "seconds": {"import": 4.0, "training": 5.9, ledger.UNACCOUNTED: 0.1}}
    assert ledger.closes(row)
    assert not ledger.closes(row | {"seconds": {"training": 9.0, ledger.UNACCOUNTED: 1.0}})
    assert not ledger.closes(row | {"seconds": {"training": 11.0}})


def test_a_target_is_reached_at_the_first_epoch_that_has_it():
    clock = time_to_accuracy.Clock()
    clock.epochs = [(3.0, 0.8), (4.0, 0.9), (5.0, 0.85), (6.0, 0.95)]
    assert clock.reached_s(0.9, compile_s=2.5) == 1.5
    assert clock.reached_s(0.96, compile_s=2.5) is None


def test_the_step_lowers_for_every_platform_and_convolves_as_each_does():
    found = {
        platform: lowering.operations("cnn", 100, "bfloat16", platform)
        for platform in ("cpu", "tpu")
    }
    assert "convolution" not in found["cpu"]
    assert found["tpu"]["convolution"] == 11  # forward, both gradients, but one for the first
    for platform in lowering.PLATFORMS:
        assert lowering.operations("logistic", 7, "float32", platform)["dot_general"] == 2


def test_all_ways_of_feeding_train_on_the_same_batches(monkeypatch, capsys):
    words = ["--model=logistic", "--repeats=1", "--batch_size=30"]
    monkeypatch.setattr("sys.argv", ["input", *words])
    assert launch.command(input.Options, input.measure, "input", "") == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"logistic .* none", out)) == 3
    original = input.jobs.Data.batch_index
    monkeypatch.setattr(input.jobs.Data, "batch_index", lambda *a: original(*a)[::-1] // 2)
    assert launch.command(input.Options, input.measure, "input", "") == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"logistic .* none", out)) == 1


def test_in_the_short_form_a_cpu_meets_the_cnn_in_step_and_roofline_only():
    def with_cnn(options: suite.Options, platform: str) -> set[str]:
        planned = suite.plan(options, {"dataset": "mnist"}, platform)
        return {part for part, asked in planned.items() if any("cnn" in a.model for a in asked)}

    assert with_cnn(suite.Options(), "cpu") == {"step", "roofline"}
    assert with_cnn(suite.Options(full=True), "cpu") == set(suite.PARTS)
    assert with_cnn(suite.Options(), "gpu") == set(suite.PARTS)


def test_the_suite_in_its_shortest_form(data_dir, tmp_path: Path, monkeypatch, capsys):
    words = ["--model=logistic", "--repeats=1", "--launches=1", "--dataset=digits"]
    words += [f"--data_dir={data_dir}", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    assert launch.command(suite.Options, suite.measure, "benchmarks", "") == 0
    [folder] = tmp_path.iterdir()
    assert re.fullmatch(r"[a-z0-9-]+-\d{8}T\d{6}Z", folder.name)
    found = results.read(folder / "results.json")
    assert found.context["left_out"] == {}
    assert {b.details["part"] for b in found.benchmarks} == {
        "step",
        "batch_size",
        "input",
        "roofline",
    }
    assert set(found.tables) == {"ledger", "time_to_accuracy", "memory", "lowering"}
    for row in found.tables["ledger"]:  # how little is unaccounted for, an idle machine tells
        assert sum(row["seconds"].values()) == pytest.approx(row["wall_s"], rel=0.02)
        assert row["seconds"][ledger.UNACCOUNTED] < 0.2 * row["wall_s"]
    page = (folder / "card.md").read_text()
    for title in card.TITLES.values():
        assert f"\n## {title}\n" in page
    for name in ("device", "driver", "versions", "variables", "commit", "command", "date"):
        assert f"\n- {name}: " in page
    for name in card.FIGURES.values():
        assert "<svg" in (folder / name).read_text()
        assert f"({name})" in page
    monkeypatch.setattr("sys.argv", ["compare"])
    same = folder / "results.json"
    from benchmarks import compare

    options = compare.Options(files=(str(same), str(same)))
    compare.measure(options)
    assert "train_step, logistic" in capsys.readouterr().out


def test_words_make_the_same_options():
    options = time_to_accuracy.Options(model=("mlp",), targets=(0.5, 0.6), batch_size=None)
    words = launch.words(options)
    from mnist_jax import cli

    assert cli.parse(time_to_accuracy.Options, words, prog="", description="") == options


@pytest.mark.parametrize(
    ("window", "ends"),
    [
        (None, [5, 10, 15]),  # the second call, of five steps
        ((3, 9), [2, 9]),
        ((8, 500), [2, 7, 15]),  # with the epoch at the latest
        ((18, 20), [2, 15, 17, 20]),
    ],
)
def test_the_trace_of_a_run_is_that_of_some_steps_and_changes_nothing(
    window, ends, data_dir, tmp_path
):
    class Calls(Callback):
        def __init__(self):
            self.ends = []

        def on_chunk_end(self, epoch, step, last_step, sums, train_s):
            self.ends.append(15 * (epoch - 1) + step)

    runs, calls = [], Calls()
    for profile in (None, tmp_path / "trace"):
        config = Config(
            model="logistic",
            dataset="digits",
            data_dir=data_dir,
            epochs=2,
            steps_per_call="auto" if window else 5,
            profile=profile,
            profile_steps=window if profile else None,
            workdir=tmp_path / f"run-{len(runs)}",
        )
        runs.append(fit(config, observer=calls if profile else None).record["params_sha256"])
    assert runs[0] == runs[1]
    found = profiling.costliest(tmp_path / "trace")
    assert 1 <= len(found) <= 10
    assert found == sorted(found, key=lambda operation: -operation.total_s)
    assert all(0 < operation.share < 1 for operation in found)
    if window is not None:
        assert set(ends) <= set(calls.ends)
        steps = min(window[1], 15 * -(-window[0] // 15)) - window[0] + 1
        # Around the loop an operation runs once, and its condition once more than its body.
        times = {operation.times for operation in profiling.costliest(tmp_path / "trace", 1000)}
        assert steps in times
        assert {n % steps for n in times - {1, steps + 1}} == {0}
    with pytest.raises(profiling.DataError, match="holds no trace"):
        profiling.costliest(tmp_path / "trace", since=time.time() + 60)


def test_a_window_beyond_the_runs_end_is_refused(data_dir, tmp_path):
    fields: Any = {"model": "logistic", "dataset": "digits", "data_dir": data_dir, "epochs": 1}
    config = Config(
        **fields, profile=tmp_path / "t", profile_steps=(16, 20), workdir=tmp_path / "run"
    )
    with pytest.raises(UsageError, match="profile_steps begin at 16, after the run's 15 steps"):
        fit(config)


def test_the_suite_compares_an_accelerator_with_the_cpu_where_that_takes_no_minutes():
    planned = suite.plan(suite.Options(), {}, "gpu")["batch_size"]
    assert [(options.model, options.platforms) for options in planned] == [
        (("logistic", "mlp"), ("cpu", "gpu")),
        (("cnn",), None),
    ]
