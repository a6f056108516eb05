"""The suite: its plan, its folder, its card; in short on logistic regression as a campaign."""

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__ as suite
from benchmarks import launch, results
from benchmarks.results import Benchmark, Results
from mnist_jax.errors import UsageError

CONTEXT = {"platform": "cpu", "device": "cpu", "cpu": "Processor", "cores": 2, "system": "Linux"}
CONTEXT |= {"git_commit": "abc", "git_dirty": False, "load": [0.0, 0.0, 0.0], "excluded": {}}
CONTEXT |= dict.fromkeys(("python", "jax", "jaxlib", "flax", "optax", "numpy"), "1.0")


def timed(part, name, model, seconds, details=None, **changes) -> Benchmark:
    fields = {"model": model, "batch_size": 100, "mode": "many steps a call"} | changes
    details = {"part": part} | (details or {})
    return Benchmark(name=name, samples_s=[seconds], details=details, **fields)


def findings() -> Results:
    benchmarks = [timed("step", "train_step", "cnn", 0.12 + i / 1000) for i in range(9)]
    eager = {"framework": "pytorch", "mode": "eager"}
    for seconds, how in ((0.1, {}), (0.2, eager)):
        peer = partial(timed, "peers", "peers_train_step", "cnn", seconds, **how)
        benchmarks += [peer(details={"round": i}) for i in range(5)]
    sweep = partial(timed, "sweep", "sweep_train_step", "mlp")
    benchmarks += [sweep(1e-3 + 1e-5 * size, batch_size=size) for size in (1, 100, 10_000)]
    roof = partial(timed, "roofline", model="", seconds=1e-2, batch_size=0)
    rates = {"matrix_product": 2e9, "copy": 2e6}
    benchmarks += [roof(name, details={"amount": amount}) for name, amount in rates.items()]
    work = {"flops": 1e9, "direct_flops": 3e9, "bytes": 1e6}
    parts = [{"part": "a step", **work, "limit_s": 0.03, "seconds": 0.12}]
    case = {"model": "cnn", "batch_size": 100, "precision": "float32"}
    seconds = dict.fromkeys(("import", "data", "compile", "train", "eval", "between"), 0.5)
    seconds |= {"start, exit": 1.0}
    reached = {"preset": "fast", "target": 0.99, "reached_s": 30.0, "compile_s": 5.0}
    rows = {
        "roofline": case | {"of_matrix_rate": 0.125, "mfu": 1.24, "parts": parts},
        "time_to_accuracy": case | reached,
        "ledger": {"model": "mlp", "cache": "cold", "seconds": seconds, "wall_s": 4.0},
        "lowering": case | {"platform": "tpu"},
    }
    tables = {name: [row | {"part": name}] for name, row in rows.items()}
    [low] = tables["lowering"]
    tables["lowering"] += [low | {"model": "mlp", "platform": name} for name in ("cpu", "tpu")]
    done = {name: {"complete": True} for name in suite.MODULES}
    more = {"parts": done, "flags": {"model": ["cnn", "mlp"]}}
    return Results(CONTEXT | more, benchmarks, tables)


def test_a_card_begins_with_six_filled_lines(tmp_path: Path):
    found = findings()
    recorder = results.Recorder(tmp_path / "results.json", found.context)
    recorder.take_in(found)
    suite.write_card(tmp_path, recorder)
    page = (tmp_path / "card.md").read_text()
    lines = page.splitlines()
    assert lines[0] == "# Processor, 2 cores"
    assert lines[2].startswith("- device: Processor, 2 cores; Linux; python 1.0, jax 1.0")
    assert lines[2].endswith("commit abc")
    assert lines[3] == (
        "- step: cnn, float32, batch 100: 124 ms a step, 74.4 s an epoch of 60,000, 806 images/s "
        "(n = 9); 0.50 (range 0.50 to 0.50) of PyTorch's fastest mode measured, eager (n = 5)"
    )
    assert "mlp: t = 1e+03 µs + 10 µs · B, half speed at batch 100" in lines[4]
    assert "200 GFLOP/s (float32), 0.2 GB/s; a step of the cnn reaches 24% of its limit" in lines[5]
    assert "MFU 120% (over 100 %: the device computes fewer operations" in lines[5]
    assert lines[6] == "- accuracy: cnn 99.0% in 30 s (fast, 1 of 1 seeds)"
    assert "mlp, 3 epochs, cold: 4 s (start, exit 25%" in lines[7]
    assert lines[7].endswith("lowers for tpu")
    for name in set(suite.MODULES) - {"seeds"}:
        assert f"\n## {name.replace('_', ' ').capitalize()}\n" in page
    assert "120 to 128" not in page and "121 to 127" in page  # of nine launches


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_plan_names_commands_and_flags_that_exist(platform):
    parts = suite.plan(platform, ["logistic", "cnn", "mlp"], 9, peers_too=platform != "tpu")
    assert {part.name for part in parts} == set(suite.MODULES) == set(launch.PARTS)
    runs = {part.name: part.runs for part in parts}
    assert [run["model"] for run in runs["peers"]] == [["cnn"]] * (platform != "tpu")
    alone = suite.plan("cpu", ["cnn"], 9, peers_too=True)
    assert [p.name for p in alone if not p.runs] == ["sweep", "time_to_accuracy", "ledger", "seeds"]
    assert sum(part.guess_s for part in parts) < 60 * {"cpu": 6}.get(platform, 13)
    for part in parts:
        for words in part.runs:
            assert words["model"] and words.keys() <= launch.FLAGS.keys()


def test_a_folder_of_another_device_is_refused_and_a_part_is_kept_until_it_is_measured_again(
    tmp_path: Path, monkeypatch
):
    found, begun = findings(), []
    given = {"output": tmp_path, "only": ["sweep", "ledger"], "flags": {}, "launches": 1}
    found.context["flags"] = {"model": launch.DEFAULTS["model"], "launches": 1}
    found.context["parts"]["step"]["excluded"] = step = {"mlp": "failed"}
    lost = step | {"seeds": "it takes about 10 s"}
    found.context["excluded"] = lost | {"cnn": "killed", "ledger": "no time", "gone": "Ctrl-C"}
    found.context["parts"]["sweep"] = {"complete": True, "excluded": {"cnn": "killed"}}  # twice
    del found.context["parts"]["ledger"]
    (tmp_path / "results.json").touch()  # as of a suite that was interrupted at once
    assert suite.open_folder(tmp_path, dict(CONTEXT))[0].found.benchmarks == []
    results.write(tmp_path / "results.json", found)
    for name, other in (("cpu", "Another"), ("jax", "0.1"), ("flags", "others")):
        with pytest.raises(UsageError, match=f"has {name} .*; here it is '{other}'"):
            suite.open_folder(tmp_path, found.context | {name: other})

    def sweep(_, recorder):
        begun.append("sweep")
        recorder.take_in(Results({}, [timed("", "sweep_train_step", "mlp", 1.0)] * len(begun), {}))
        if len(begun) < 3:
            raise UsageError("failed")

    monkeypatch.setattr(launch, "where", lambda _: dict(CONTEXT))
    monkeypatch.setattr(suite.sweep, "measure", sweep)
    monkeypatch.setattr(suite.ledger, "measure", lambda *_: begun.append("ledger"))
    before = [b.samples_s for b in found.part("sweep").benchmarks]
    for samples, why in ((before, {"sweep": "failed"}), ([[1.0]] * 3, {})):
        suite.measure(argparse.Namespace(**launch.DEFAULTS | given))
        kept = results.read(tmp_path)
        assert [b.samples_s for b in kept.part("sweep").benchmarks] == samples
        assert kept.context["excluded"] == lost | why
        assert kept.part("sweep", rest=True)[1:] == found.part("sweep", rest=True)[1:]
    assert begun == ["ledger", "sweep", "sweep"]  # what was never measured comes first


@pytest.mark.campaign
def test_the_suite_in_short_and_what_it_adds_later(data_dir, tmp_path: Path):
    def run(*more: str) -> dict:
        words = f"--model logistic --launches=1 --dataset=digits --data_dir={data_dir}".split()
        launch.run([sys.executable, "-m", "benchmarks", *words, f"--output={tmp_path}", *more])
        return json.loads((tmp_path / "results.json").read_text())

    first = run("--budget_minutes=0.4", "--only", "lowering", "roofline")
    assert list(first["context"]["parts"]) == ["lowering"]
    assert "it takes about 40 s" in first["context"]["excluded"]["roofline"]
    parts = ("step", "roofline", "sweep", "time_to_accuracy", "seeds", "ledger")
    second = run("--budget_minutes=20", "--only", *parts)
    assert second["context"]["excluded"] == {}
    assert set(second["context"]["parts"]) == {"lowering", *parts}
    page = (tmp_path / "card.md").read_text()
    assert page.partition("\n## ")[0].count("not measured") == 0
    assert re.search(r"logits +\|", page)


@pytest.mark.campaign
def test_scaling_over_virtual_devices(tmp_path: Path):
    file = tmp_path / "scaling.json"
    words = f"--model logistic --batch_size 10 --devices 2 3 --repeats=2 --output={file}"
    command = [sys.executable, "-m", "benchmarks.scaling", *words.split()]
    out, _ = launch.run(command, {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"})
    kinds = [(b.name.split("_")[0], b.details["devices"]) for b in results.read(file).benchmarks]
    several = [(kind, n) for n in (2, 3) for kind in ("strong", "weak")]
    assert kinds == [("strong", 1), *several]
    assert out.count("| strong") == 3
