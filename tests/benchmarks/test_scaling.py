"""Scaling over devices: what is timed, what its ratios say, and what is predicted from them."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cost_model, forecast, launch, results, scaling, step, timing
from benchmarks.cost_model import Cluster, Link, StepTime
from benchmarks.peer_workers import job as jobs
from benchmarks.peer_workers import ours
from benchmarks.results import Benchmark, Results
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.parallel import mesh as devices

ROOT = Path(__file__).parents[2]
# Latencies are such that the way for small messages is never the shorter one.
SLOW = Cluster(Link(1e9, 0.0), Link(1e8, 0.0), 8)
STEP = StepTime(0.5, 0.01)


def test_a_ring_passes_all_but_its_own_part_twice():
    assert cost_model.ring_s(8, 8e9, Link(1e9, 0.0)) == pytest.approx(2 * 7)
    assert cost_model.ring_s(2, 8e9, Link(1e9, 0.0)) == pytest.approx(8)
    assert cost_model.ring_s(5, 0, Link(1e9, 1e-3)) == pytest.approx(8e-3)
    assert cost_model.ring_s(1, 8e9, Link(1e9, 1.0)) == 0


def test_between_hosts_each_device_takes_its_part_around():
    # In a host 2 · 7/8 of 8 GB at 1 GB/s; between 4 hosts 2 · 3/4 of 1 GB at 0.1 GB/s.
    assert cost_model.all_reduce_s(32, 8e9, SLOW) == pytest.approx(14 + 15)
    assert cost_model.all_reduce_s(8, 8e9, SLOW) == pytest.approx(14)
    assert cost_model.all_reduce_s(3, 3e9, SLOW) == pytest.approx(4)
    with pytest.raises(ValueError, match="12 devices do not fill hosts of 8"):
        cost_model.all_reduce_s(12, 8e9, SLOW)


def test_small_messages_go_the_quick_way():
    cluster = Cluster(Link(1e9, 1e-5), Link(1e9, 1e-5), 8)
    assert cost_model.all_reduce_s(2, 0, cluster) == pytest.approx(2 * 1e-5 / 5)
    assert cost_model.all_reduce_s(2, 1e9, cluster) == pytest.approx(1 + 2e-5)


def test_one_device_and_free_sums_are_fully_efficient():
    free = Cluster(Link(math.inf, 0.0), Link(math.inf, 0.0), 8)
    proportional = StepTime(0.0, 0.01)
    for count, cluster in ((1, SLOW), (8, free), (64, free)):
        sum_s = cost_model.all_reduce_s(count, 1e9, cluster)
        assert sum_s == 0
        assert cost_model.weak(STEP, 100, count, sum_s) == (1, 1)
        assert cost_model.strong(proportional, 640, count, sum_s) == pytest.approx((1, 1))


def test_efficiency_by_hand():
    # 100 images take 1.5 s; with 0.5 s for the sum 2 s, or 1.5 s if that is hidden.
    assert cost_model.weak(STEP, 100, 4, 0.5) == pytest.approx((0.75, 1))
    # 25 images take 0.75 s: with the sum 1.25 s, at best 0.75 s, of four devices.
    assert cost_model.strong(STEP, 100, 4, 0.5) == pytest.approx((1.5 / 5, 1.5 / 3))
    assert cost_model.strong(STEP, 97, 4, 0.5)[0] == pytest.approx(1.47 / 5)  # 25, 24, 24, 24
    # A sum that is longer than the computing cannot be hidden behind it.
    assert cost_model.weak(STEP, 100, 4, 3.0) == pytest.approx((1.5 / 4.5, 0.5))


def test_efficiency_falls_with_devices_and_bytes_and_rises_with_the_batch():
    def both(count: int, images: int = 6400, size: float = 1e9) -> list[float]:
        sum_s = cost_model.all_reduce_s(count, size, SLOW)
        cases = cost_model.weak(STEP, images, count, sum_s)
        return [*cases, *cost_model.strong(STEP, images, count, sum_s)]

    for changed in (
        [both(count) for count in (1, 2, 4, 8, 16, 64)],
        [both(64, size=size) for size in (1e8, 1e9, 1e10)],
        [both(64, images=images) for images in (640_000, 64_000, 6400)],
    ):
        for before, after in itertools.pairwise(changed):
            assert all(a <= b for a, b in zip(after, before, strict=True))
            assert after[0] < before[0] and after[2] < before[2]
    assert all(strong < weak for weak, strong in [both(64)[::2]])


def test_weak_is_strong_with_the_whole_batch_where_time_is_proportional():
    proportional = StepTime(0.0, 0.01)
    weak = cost_model.weak(proportional, 100, 8, 0.3)
    assert weak == pytest.approx(cost_model.strong(proportional, 800, 8, 0.3))


def test_where_the_sum_is_a_share_of_the_step():
    for share in (0.1, 0.5):
        images = cost_model.images_for(share, STEP, 8, 0.9)
        assert 0.9 / (0.9 + STEP.of(images / 8)) == pytest.approx(share)
    assert cost_model.images_for(0.5, STEP, 8, 0.4) == 0  # the overhead is longer
    assert cost_model.images_for(0.5, StepTime(0.1, 0.0), 8, 0.4) == math.inf


def test_the_line_is_found_and_never_falls():
    found = cost_model.fit([13, 25, 50, 100], [STEP.of(n) for n in (13, 25, 50, 100)])
    assert found == pytest.approx(STEP)
    assert cost_model.fit([10, 100], [2.0, 1.0]).image_s == 0
    assert cost_model.fit([10, 100], [0.5, 10.0]).overhead_s == 0


def test_what_slows_whole_rounds_is_not_in_a_ratio():
    drift = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 8.0])
    assert timing.ratio(drift, 2 * drift) == pytest.approx((0.5, 0.5, 0.5))
    middle, low, high = timing.ratio([1, 2, 3, 4, 5], [2, 2, 2, 2, 2])
    assert middle == 1.5 and low < middle < high


def test_cases_take_turns_and_keep_warming_up_apart(monkeypatch):
    order = []

    class Clock:
        now_s = 0.0

    def case(name: str, each_s: float) -> scaling.Case:
        def call(state: list, steps: int) -> list:
            assert state.pop() == "alive", "a donated state was used again"
            order.append((name, steps))
            Clock.now_s += steps * each_s
            return ["alive"]

        names = step.named(jobs.Job(model="mlp", mode=name), step.TRAIN)
        return scaling.Case(names, call, ["alive"], {"devices": 1})

    monkeypatch.setattr(
        scaling.timing.measure, "__kwdefaults__",
        timing.measure.__kwdefaults__ | {"clock": lambda: Clock.now_s},
    )  # fmt: skip
    found = scaling.in_turn([case("a", 0.02), case("b", 0.3)], samples=3, min_sample_s=0.1)
    turns = [name for name, _ in itertools.groupby(name for name, _ in order)]
    assert turns == ["a", "b", "a", "b", "a"]  # a b, b a, a b, b a
    steps = {b.mode: b.details["steps_per_sample"] for b in found}
    assert steps["b"] == 1 and 0.1 / 0.02 <= steps["a"] <= 10
    # A step and a sample to warm up, then the sample; how many steps it has stays as found.
    assert [n for name, n in order if name == "a"][-6:] == [1, steps["a"], steps["a"]] * 2
    for b, each_s in zip(found, (0.02, 0.3), strict=True):
        assert b.samples_s == pytest.approx([each_s] * 3)
        assert len(b.warmup_s) >= 4


def timed(kind: str, count: int, seconds: float, images: int = 100) -> Benchmark:
    details = {"kind": kind, "devices": count, "base": 100, "gradients_apart": 1e-7}
    job = jobs.Job(model="cnn", batch_size=images, mode=f"{kind}, {count}")
    name = scaling.SUM if kind == scaling.SUM else step.TRAIN
    return Benchmark.of([seconds] * 5, **step.named(job, name), details=details)


@pytest.mark.parametrize(
    ("note", "heading", "strong", "weak"),
    [({}, "efficiency", "0.800", "0.500"), ({"note": "cores"}, "cost", "5.000", "2.000")],
)
def test_the_table_by_hand(note, heading, strong, weak, capsys):
    S, W = scaling.STRONG, scaling.WEAK  # noqa: N806
    found = [timed(S, 1, 8), timed(S, 4, 2.5 if not note else 40), timed(scaling.SUM, 4, 0.125)]
    found += [timed(W, 4, 16 if not note else 64, 400), timed(scaling.SHARE, 4, 2, 25)]
    launch.show(scaling.report(Results({"left_out": {}, **note}, found, {})))
    out = capsys.readouterr().out
    assert out.count(heading) == 2 and ("cores" in out) == bool(note)
    row = next(line.split() for line in out.splitlines() if line.lstrip().startswith("4 "))
    assert row[2] == strong and row[7] == weak
    assert row[-3:] == ["2000", "125", "1e-07"]


def test_what_was_measured_of_one_device_is_what_the_prediction_takes():
    found = [timed(scaling.STRONG, 1, 1.5), timed(scaling.SHARE, 4, 0.75, 25)]
    found += [timed(scaling.STRONG, 4, 9.0), timed(scaling.WEAK, 4, 9.0, 400)]
    assert scaling.fitted([*found, timed(scaling.SUM, 4, 9.0)]) == pytest.approx(STEP)


@pytest.mark.parametrize(
    ("found", "asked", "counts"),
    [
        (8, (), [1, 2, 4, 8]),
        (6, (), [1, 2, 4, 6]),
        (2, (), [1, 2]),
        (8, (3,), [1, 3]),
        (8, (8, 1, 2), [1, 2, 8]),
    ],
)
def test_which_numbers_of_devices_are_measured(found, asked, counts):
    assert scaling.device_counts(found, asked, "gpu") == counts


def test_too_few_devices_are_refused():
    with pytest.raises(DeviceError, match=r"2 devices are needed; JAX finds 1 .*CES=8 in"):
        scaling.device_counts(1, (), "cpu")
    with pytest.raises(DeviceError, match=r"9 devices .* 8 of gpu.*DEVICES=9 .*--platform=cpu"):
        scaling.device_counts(8, (2, 9), "gpu")
    with pytest.raises(UsageError, match="devices is 1"):
        scaling.device_counts(8, (1,), "cpu")


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["scaling", *words])
    status = launch.command(scaling.Options, scaling.measure, "scaling", "")
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 6, "JAX_NUM_CPU_DEVICES=8"),
        (["--devices", "2", "16"], 6, "JAX_NUM_CPU_DEVICES=16"),
        (["--devices=0"], 2, "devices is 0; allowed is 1 or more"),
        (["--device=2"], 2, "did you mean --devices?"),
        (["--predict", "--devices=2"], 2, "leave --devices or --predict out"),
        (
            ["--predict", "--step_ms", "1", "0"],
            2,
            "step_ms is 0.0; allowed is any finite",
        ),
        (
            ["--predict", "--nvlink_us=-1"],
            2,
            "nvlink_us is -1.0; allowed is any finite",
        ),
        (["--predict", "--infiniband_gb_s=nan"], 2, "infiniband_gb_s is nan"),
        (["--predict", "--fixed_ms=0.1"], 2, "fixed_ms is 0.1; allowed is less than step_ms"),
        (["--predict", "--output=/proc/scaling.json"], 6, "cannot write /proc/scaling.json"),
    ],
)
def test_mistakes_are_answered_before_anything_is_measured(
    words, status, message, monkeypatch, capsys
):
    monkeypatch.setattr(scaling, "in_turn", lambda *_: pytest.fail("it measured"))
    found, out, err = run(monkeypatch, capsys, *words)
    assert (found, out, err.count("\n"), message in err) == (status, "", 1, True), err


def test_a_prediction_says_so_and_of_what(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "in_turn", lambda *_: pytest.fail("it measured"))
    file = tmp_path / "scaling.json"
    words = ["--model=cnn", "--batch_size=200", "--step_ms=2", "--fixed_ms=1", f"--output={file}"]
    status, out, _ = run(monkeypatch, capsys, "--predict", "--nvlink_gb_s=100", *words)
    assert status == 0
    assert forecast.TITLE in out and "step assumed" in out and "100 GB/s, 3.4 µs in a host" in out
    found = results.read(file)
    assert found.benchmarks == [] and "note" not in found.context
    near, far = found.tables["prediction"]
    assert [near["devices"], far["devices"]] == [8, 64]
    assert near["gradient_bytes"] == 4 * 5_259_594
    # 21 MB and the loss at 100 GB/s in 14 passes; the counts by the quick way.
    sum_s = 14 * ((4 * 5_259_594 + 4) / 8 / 100e9 + 3.4e-6) + 14 * (1 / 25e9 + 3.4e-6 / 5)
    assert near["all_reduce_s"] == pytest.approx(sum_s)
    assert near["weak"]["nothing_hidden"] == pytest.approx(2e-3 / (2e-3 + sum_s))
    assert near["strong"]["nothing_hidden"] == pytest.approx(2e-3 / 8 / (1.125e-3 + sum_s))
    assert near["flops_per_s"] == pytest.approx(200 * 545.8e6 / 2e-3, rel=0.01)
    assert far["all_reduce_s"] > near["all_reduce_s"]


def test_a_program_must_fit_on_all_devices_that_share_the_memory(monkeypatch):
    program = jax.jit(lambda x, count: x + count)
    x = jnp.ones(1000)
    one = ours.AnyLength(program, jax.devices()[0])
    one.compile(x, count=1)
    monkeypatch.setattr(devices, "memory_bytes", lambda _: 2 * ours.needed_bytes(one.analysis) - 1)
    ours.AnyLength(program, jax.devices()[0]).compile(x, count=1)
    with pytest.raises(DeviceError, match="out of memory"):
        ours.AnyLength(program, jax.devices()[0], count=2).compile(x, count=1)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> tuple[dict, str, Results]:
    """What tests/benchmarks/on_devices.py found on four devices of a CPU, printed and wrote."""
    file = tmp_path_factory.mktemp("scaling") / "scaling.json"
    where = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "tests/benchmarks/on_devices.py", str(file)]
    done = subprocess.run(script, cwd=ROOT, env=where, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    *out, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(out), results.read(file)


def test_the_sum_alone_is_one_operation_in_the_loop_and_a_sum(four):
    for sums in four[0]["sums"]:
        assert (sums["operands"], sums["in_loop"]) == ([2], True)
        assert all(sums["means"]) and all(sums["began_apart"])


def test_all_that_was_timed_is_in_the_file(four):
    _, _, found = four
    names = [(b.name, b.mode, b.batch_size) for b in found.benchmarks]
    assert names == [
        ("train_step", "strong, 1", 10),
        ("train_step", "strong, 2", 10),
        ("train_step", "weak, 2", 20),
        ("train_step", "share alone, 2", 5),
        ("all_reduce", "2 devices", 10),
        ("train_step", "strong, 3", 10),  # 4, 4 and 2 images
        ("train_step", "weak, 3", 30),
        ("train_step", "share alone, 3", 4),
        ("all_reduce", "3 devices", 10),
    ]
    assert all(len(b.samples_s) == 2 and b.warmup_s for b in found.benchmarks)
    assert found.benchmarks[4].details["bytes"] == 4 * 7850
    apart = [b.details["gradients_apart"] for b in found.benchmarks if b.mode.startswith("strong")]
    assert apart[0] == 0 and 0 < max(apart[1:]) < 1e-5


def test_devices_of_a_cpu_show_costs_and_say_why_and_predict_nothing(four):
    findings, out, found = four
    assert findings["status"] == 0
    assert found.context["note"] == scaling.VIRTUAL and scaling.VIRTUAL in out
    assert "cost" in out and "efficiency  " not in out
    assert "prediction" not in found.tables and forecast.TITLE not in out
