"""The plan for a lent GPU, tried on a CPU, and what its page makes of findings."""

import dataclasses
import importlib
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest

from benchmarks import budget, gpu, launch, peers, results, targets
from benchmarks.peer_workers import ours
from benchmarks.peer_workers.job import Job
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax import cli
from mnist_jax.errors import UsageError


def planned(tmp_path: Path, **options) -> list[budget.Command]:
    data = {"dataset": "mnist", "data_dir": tmp_path}
    return gpu.plan(gpu.Options(output=tmp_path, **options), data, tmp_path / "scratch")


def test_the_plan_names_commands_that_exist_in_the_order_of_the_parts(tmp_path: Path):
    commands = planned(tmp_path)
    assert list(dict.fromkeys(c.part for c in commands)) == list(gpu.PARTS)
    assert len({(c.part, c.name) for c in commands}) == len(commands)
    seeds: dict[str, set[int]] = {}
    for command in commands:
        if command.words[0] == "train.py":
            config = cli.parse_config(command.words[1:], prog="", description="")
            assert (config.platform, config.dataset) == ("gpu", "mnist")
            if command.part == "recipes":
                seeds.setdefault(config.preset, set()).update(config.all_seeds())
        elif command.words[1] != "mnist_jax":
            name = "benchmarks.__main__" if command.kind == "suite" else command.words[1]
            kind = importlib.import_module(name).Options
            asked = cli.parse(kind, command.words[2:], prog="", description="")
            assert (asked.platform, getattr(asked, "full", False)) == ("gpu", False)
    assert {preset: len(some) for preset, some in seeds.items()} == {
        "fast": 50,
        "best": 20,
        "tutorial": 20,
    }


def test_what_votes_comes_after_the_run_that_it_needs(tmp_path: Path):
    commands = planned(tmp_path)
    votes = [c for c in commands if c.kind == "vote"]
    assert len(votes) == 2
    for vote in votes:
        [run] = [c for c in commands if c.made == Path(vote.words[3]) / "result.json"]
        assert commands.index(run) < commands.index(vote)


def measure(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["gpu", *words])
    status = launch.command(gpu.Options, gpu.measure, "gpu", "")
    return status, capsys.readouterr().err


# Others of their kind are run; together these take as long again.
SPARED = {"batch-4096", "logistic-float32", "logistic-alone", "fast-1234"}


def test_nearly_all_of_it_in_short_on_a_cpu(data_dir, tmp_path: Path, monkeypatch, capsys):
    plan = gpu.plan
    monkeypatch.setattr(gpu, "plan", lambda *args: [c for c in plan(*args) if c.name not in SPARED])
    words = ["--platform=cpu", "--short", f"--data_dir={data_dir}", f"--output={tmp_path}"]
    status, err = measure(monkeypatch, capsys, *words)
    assert status == 0, err
    found = results.read(tmp_path / gpu.FILE)
    assert found.context["left_out"] == {}
    assert list(found.context["seconds"]) == [part for part in gpu.PARTS if part != "peers"]
    assert found.context["dataset"] == "digits"
    assert found.context["git_commit"]
    for command, words_ in found.context["commands"].items():
        assert words_.startswith("python "), command
        assert (tmp_path / f"{command}.out").exists()
    parts = {b.details["part"] for b in found.benchmarks}
    parts |= {row["part"] for rows in found.tables.values() for row in rows}
    assert parts == set(gpu.PARTS) - {"peers", "suite"}
    assert list((tmp_path / "suite").glob("*/card.md"))
    runs = {(row["part"], row["command"]): row for row in found.tables["runs"]}
    kept = json.loads((tmp_path / "accuracy" / "logistic.json").read_text())
    assert runs["accuracy", "logistic"]["params_sha256"] == kept["params_sha256"]
    alike = [runs["deterministic", name] for name in ("off", "once", "killed")]
    assert len({row["params_sha256"] for row in alike}) == 1  # on a CPU, without the flag too
    assert alike[-1]["kills"] >= 1
    assert found.tables["votes"][0]["members"] == 2
    page = (tmp_path / gpu.SUMMARY).read_text()
    assert page.count("| not measured |") == len(targets.TARGETS)
    assert "measure nothing" in page

    # Parts that are measured again are replaced, or left out; others stay.
    more = ["--parts", "accuracy", "seeds", "--budget_minutes=0.001"]
    assert measure(monkeypatch, capsys, *words, *more)[0] == 0
    again = results.read(tmp_path / gpu.FILE)
    assert list(again.context["left_out"]) == [
        "accuracy/logistic",
        "seeds/logistic",
    ]
    assert "of the budget are left" in again.context["left_out"]["accuracy/logistic"]
    assert again.benchmarks == found.benchmarks
    assert len(again.tables["runs"]) == len(runs) - 2
    assert set(again.context["seconds"]) == set(found.context["seconds"]) - {"accuracy", "seeds"}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--platform=cpu"], 2, "needs --short"),
        (["--budget_minutes=0"], 2, "budget_minutes is 0"),
        (["--parts", "epic"], 2, "epic"),
        ([], 6, "--platform=cpu --short tries the plan"),
    ],
)
def test_mistakes_and_a_missing_gpu_are_answered_in_one_line(
    words, status, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found, err = measure(monkeypatch, capsys, f"--output={tmp_path / 'new'}", *words)
    assert (found, err.count("\n"), message in err) == (status, 1, True)
    assert not (tmp_path / "new").exists()


def test_findings_of_another_device_are_not_mixed_in(tmp_path: Path):
    file = tmp_path / gpu.FILE
    results.write(file, {"device": "A"}, [])
    with pytest.raises(UsageError, match="is of A, and this is B"):
        budget.keep_earlier(Recorder(None, {"device": "B"}), file, ())


def test_of_an_earlier_file_only_parts_that_are_not_asked_for_again_stay(tmp_path: Path):
    old, new = (
        findings((part, "cnn", 100, "tf32", ours.MANY, 0.001)).benchmarks[0]
        for part in ("epoch", "peers")
    )
    names = {"epoch/a": "x", "peers/b": "y"}
    made_by = {"device": "A", "git_commit": "c", "jax": "0.11"}
    context = {**made_by, "left_out": names, "commands": names, "seconds": {"epoch": 1.0}}
    tables = {"runs": [{"part": "seeds"}, {"part": "peers"}]}
    results.write(tmp_path / gpu.FILE, context, [old, new], tables)
    recorder = Recorder(None, {**made_by, "commands": {}, "seconds": {}})
    budget.keep_earlier(recorder, tmp_path / gpu.FILE, ("peers", "suite"))
    assert recorder.benchmarks == [old]
    assert recorder.tables == {"runs": [{"part": "seeds"}]}
    kept = recorder.context
    assert kept["left_out"] == kept["commands"] == {"epoch/a": "x"}
    assert kept["seconds"] == {"epoch": 1.0}
    for name in made_by:
        recorder = Recorder(None, {**made_by, name: "other", "commands": {}, "seconds": {}})
        with pytest.raises(UsageError, match="and this is other"):
            budget.keep_earlier(recorder, tmp_path / gpu.FILE, ())


def command(tmp_path: Path, script: str, **more) -> budget.Command:
    fields = {"part": "p", "name": "c", "minutes": 1.0, "made": tmp_path / "p" / "c.json"}
    return budget.Command(words=["-c", script], **{"kind": "run", **fields, **more})


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path):
    script = (
        "import subprocess, sys, time; s = 'import time; time.sleep(60)';"
        "print(subprocess.Popen([sys.executable, '-c', s]).pid, flush=True); time.sleep(60)"
    )
    said = tmp_path / "said.out"
    with pytest.raises(launch.ProcessError, match="ended after 1 s"):
        budget.run(command(tmp_path, script), said, 1.0, {})
    child = Path(f"/proc/{int(said.read_text())}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child lives on")


def test_what_fails_is_named_and_what_a_benchmark_wrote_by_then_counts(tmp_path: Path):
    [b] = findings(("epoch", "cnn", 100, "tf32", ours.MANY, 0.001)).benchmarks
    made = tmp_path / "p" / "c.json"
    results.write(tmp_path / "some.json", {"left_out": {"x": "y"}}, [b])
    some = f"import shutil; shutil.copy({str(tmp_path / 'some.json')!r}, {str(made)!r});"
    fails = f"{some} raise SystemExit('too bad')"
    recorder = Recorder(None, {"commands": {}, "seconds": {}})
    for kind, name in (("results", "c"), ("run", "d")):
        one = command(tmp_path, fails, kind=kind, name=name, made=made)
        budget.perform(one, recorder, made.parent, 60.0, {})
    nothing = command(tmp_path, "pass", kind="vote", name="e", made=tmp_path / "p" / "e.out")
    budget.perform(nothing, recorder, made.parent, 60.0, {})
    assert [b.details["command"] for b in recorder.benchmarks] == ["c"]
    lost = recorder.context["left_out"]
    assert list(lost) == ["p/c", "p/c: x", "p/d", "p/e"]
    assert lost["p/c"] == lost["p/d"] == "status 1: too bad"
    assert "nothing that can be read" in lost["p/e"]
    assert recorder.context["seconds"]["p"] > 0


def findings(*steps: tuple, **tables: list[dict]) -> Results:
    made = [
        Benchmark.of(
            [seconds],
            name="train_step",
            framework="mnist_jax" if mode in (ours.MANY, ours.ONE) else "pytorch",
            model=model,
            batch_size=batch_size,
            precision=precision,
            mode=mode,
            details={"part": part, "round": 0, **(more[0] if more else {})},
        )
        for part, model, batch_size, precision, mode, seconds, *more in steps
    ]
    return Results({"left_out": {}}, made, tables)


FOUND = findings(
    ("epoch", "cnn", 100, "bfloat16", ours.MANY, 0.0001),
    ("epoch", "cnn", 100, "bfloat16", ours.ONE, 0.0005),
    ("epoch", "cnn", 100, "tf32", ours.MANY, 0.0005),
    ("epoch", "cnn", 4096, "bfloat16", ours.MANY, 0.01, {"mfu": 0.55}),
    ("peers", "cnn", 100, "bfloat16", ours.MANY, 0.001),
    ("peers", "cnn", 100, "bfloat16", "eager", 0.004),
    ("peers", "cnn", 100, "bfloat16", "eager, fused Adam", 0.0025),
    ("peers", "cnn", 100, "bfloat16", "torch.compile, CUDA graphs", 0.00125),
    ("peers", "mlp", 100, "float32", ours.MANY, 0.001),
    time_to_accuracy=[
        {
            "part": "time_to_accuracy",
            "model": "cnn",
            "precision": "bfloat16",
            "seed": 1234 + i,
            "target": target,
            "reached_s": 0.5 + i if target < 0.995 or i else None,
            "data_s": 0.2,
            "train_s": 1.0,
        }
        for i in range(2)
        for target in (0.99, 0.995)
    ],
    runs=[
        {"part": "seeds", "command": "cnn", "seeds": 2, "timings": {"train_s": 0.8}},
        {"part": "recipes", "command": "fast-1234", "test_accuracy": [0.994, 0.996]},
        {"part": "recipes", "command": "fast-1244", "test_accuracy": [0.998, 0.996]},
    ],
    votes=[{"command": "ensemble-1234", "averaged": {"accuracy": 0.9981, "correct": 9981}}],
)
FOUND.tables["votes"][0]["members"] = 10


def test_the_targets_are_looked_up_in_the_findings():
    found = {target.what: target.find(FOUND) for target in targets.TARGETS}
    values = {what: value and value[0] for what, value in found.items()}
    expected = {
        "an epoch of the CNN, batch 100, bfloat16": 60.0,
        "an epoch of the CNN, batch 100, tf32": 300.0,
        "the CNN at batch 4096, of the measured matrix rate": 55.0,
        "CNN, bfloat16 ÷ PyTorch eager": 0.4,  # the faster of the two
        "CNN, bfloat16 ÷ compiled": 0.8,
        "CNN, tf32 ÷ PyTorch eager": None,
        "CNN, tf32 ÷ compiled": None,
        "MLP ÷ PyTorch eager": None,  # PyTorch was left out
        "MLP ÷ compiled": None,
        "logistic ÷ PyTorch eager": None,
        "logistic ÷ compiled": None,
        "the CNN to 99.0 %": 0.8,
        "the CNN to 99.5 %": math.inf,  # not all reach it
        "16 seeds of the CNN in one program, times as fast": 2.5,
        "16 seeds of the MLP in one program, times as fast": None,
        "fast, mean": 99.6,
        "best, mean": None,
        "ten of best, mean probabilities": 99.81,
    }
    assert values == {k: v and pytest.approx(v) for k, v in expected.items()}
    assert found["the CNN to 99.5 %"][1].startswith("1 of 2 seeds")
    nothing = Results({}, [], {})
    assert not any(target.find(nothing) for target in targets.TARGETS)


def test_the_page_says_what_is_met_what_is_not_and_what_is_missing():
    timings = {"timings": {"train_s": 2.0, "compile_s": 3.0}, "test_accuracy": 0.99}
    runs = [
        {"part": "deterministic", "command": name, "params_sha256": digest, **timings, **more}
        for name, digest, more in (
            ("off", "c", {"timings": {"train_s": 1.6, "compile_s": 3.0}}),
            ("once", "a", {}),
            ("again", "a", {}),
            ("killed", "b", {"kills": 3}),
        )
    ]
    context = dict.fromkeys(("device", "driver", "cpu", "jax", "dataset", "git_commit"), "text")
    context |= {"git_dirty": False, "short": False, "left_out": {"peers/x": "why"}}
    context |= {"seconds": {"epoch": 12.3}}
    page = targets.summary(Results(context, FOUND.benchmarks, {"runs": runs}))
    lines = page.splitlines()
    of = "600 steps of the median of 1 samples"
    assert f"| an epoch of the CNN, batch 100, bfloat16 | ≤ 100 ms | 60 ms | {of} | yes |" in lines
    assert f"| an epoch of the CNN, batch 100, tf32 | ≤ 250 ms | 300 ms | {of} | no |" in lines
    assert "| best, mean | ≥ 99.7 % | not measured |  |  |" in lines
    assert "one dispatch a step, bfloat16: 300 ms an epoch" in lines
    assert "3 deterministic runs, killed 3 times in all: 2 different sets of parameters." in lines
    assert "--deterministic: training takes 1.25 times as long as without." in lines
    assert "- peers/x: why" in lines
    assert "Time taken: epoch 12 s." in lines


def test_beside_a_gpu_stands_pytorch_in_the_same_precision(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(python, module, question, variables):
        asked.append((module.rpartition(".")[2], Job(**question)))
        train = {"warmup_s": [], "samples_s": [0.1], "steps_per_sample": 1}
        output = {"train": train, "peak_rss_bytes": 1, "context": {"device": "some GPU"}}
        assert variables == {}
        return launch.Finished(output, 0.1, 0.0)

    monkeypatch.setattr(launch, "ask", answer)
    options = peers.Options(
        output=tmp_path / "peers.json",
        models=("cnn",),
        rounds=1,
        what=("train",),
        platform="gpu",
        precision="tf32",
    )
    peers.measure(options)
    assert [worker for worker, _ in asked] == ["ours", *["pytorch"] * 4]
    assert {(job.platform, job.precision) for _, job in asked} == {("gpu", "tf32")}
    assert {b.precision for b in results.read(options.output).benchmarks} == {"tf32"}
    assert "pytorch" in capsys.readouterr().out
    with pytest.raises(UsageError, match="precision is 'bfloat16'; allowed on a CPU is float32"):
        dataclasses.replace(options, platform="cpu", precision="bfloat16")


@pytest.mark.parametrize("module", ["ours", "pytorch"])
def test_workers_take_the_precision_that_they_are_asked_for(module):
    if module == "pytorch" and importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    size = {"train_size": 300, "test_size": 300, "samples": 1, "budget_s": 0.1, "warmup_s": 0.1}
    mode = ours.MANY if module == "ours" else "eager, fused Adam"
    job = Job(model="logistic", mode=mode, precision="bfloat16", platform="cpu", **size)
    name = f"benchmarks.peer_workers.{module}"
    answer = launch.ask(Path(sys.executable), name, dataclasses.asdict(job)).output
    assert answer["train"]["samples_s"][0] > 0
    assert answer["eval"]["samples_s"][0] > 0
