"""What is derived from measurements: laws, roofs, kernels, ratios, on planted data."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import peers, roofline, step, sweep, time_to_accuracy
from benchmarks.results import Benchmark, Results
from benchmarks.workers import trace
from mnist_jax.models import make_model

ROW = {"model": "cnn", "batch_size": 100, "precision": "float32", "issued_per_step": None}


def test_the_law_of_batch_sizes_is_found_and_the_largest_is_never_called_saturated():
    sizes = [1, 8, 64, 512, 4096]
    law = sweep.fit(sizes, [1e-3 + 1e-5 * size for size in sizes])
    assert (law.a_s, law.b_s) == (pytest.approx(1e-3), pytest.approx(1e-5))
    assert law.error < 1e-6 and "half speed at batch 100" in str(law)
    assert "the fit misses by up to 68%" in str(sweep.fit([1, 10, 100], [1.0, 5.0, 6.0]))
    assert sweep.fit(sizes[:2], [1.0, 2.0]) is None
    assert sweep.fit([1, 2, 4, 8, 16], [1.0, 2.9, 4.1, 8.1, 20.0]).saturated == 4  # not 1
    for largest, saturated in ((4096, None), (65536, 16384)):
        sizes = [4**i for i in range(9) if 4**i <= largest]
        law = sweep.fit(sizes, [1e-1 + 1e-4 * size for size in sizes])
        assert law.saturated == saturated
        assert ("not saturated at batch 4096" in str(law)) == (saturated is None)


def test_operations_and_bytes_of_the_cnn_by_hand():
    on_gpu, on_cpu = (roofline.works(make_model("cnn"), 100, name) for name in ("gpu", "cpu"))
    convolutions = 28 * 28 * 9 * 64 * 64 + 14 * 14 * 9 * 64 * 128 + 12 * 12 * 9 * 128 * 256
    dense = 9216 * 512 + 512 * 256 + 256 * 10
    first = 2 * 2 * 100 * 28 * 28 * 9 * 64  # no gradient of the images
    assert on_gpu[""].direct_flops == first + 6 * 100 * (convolutions + dense)
    assert on_gpu[""].flops == on_gpu[""].direct_flops == on_cpu[""].direct_flops
    tiled = {"conv2": (7 * 7, 64, 64), "conv3": (4 * 4, 64, 128), "conv4": (3 * 3, 128, 256)}
    for name, (tiles, inputs, outputs) in tiled.items():  # a tile has 36 products
        assert on_cpu[name].flops == 6 * 100 * tiles * 36 * inputs * outputs
    assert on_gpu[roofline.REST].bytes == 7 * 4 * 5_259_594
    assert on_gpu["pool1"] == roofline.Work(0, 0, 4 * 4 * 100 * 14 * 14 * 64)
    product = jax.named_call(jax.named_call(jnp.matmul, name="Dense_0"), name="Block_0")
    traced = jax.make_jaxpr(product)(jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert roofline.products(traced.jaxpr, ["Dense_0", "Block_0"], "cpu") == [("Block_0", 48, 48)]


def rate(name, amount, samples_s) -> Benchmark:
    return Benchmark(name=name, samples_s=samples_s, details={"amount": amount})


def test_the_roof_is_the_best_sample_and_bandwidth_is_that_of_the_nearest_size():
    measured = [
        rate(roofline.PRODUCT, 10, [2.0, 1.0, 5.0]),
        rate(roofline.PRODUCT, 100, [5.0, 20.0, 20.0]),
        rate(roofline.COPY, 2 * 2**20, [1.0]),
        rate(roofline.COPY, 2 * 2**28, [1024.0]),
    ]
    found = Results({"platform": "cpu"}, measured, {})
    roof = roofline.roof(found, "float32")
    assert roof == (20.0, {2**20: 2.0**21, 2**28: 2.0**19})
    assert roof.limit_s(roofline.Work(40, 400, 0)) == 2.0
    assert roof.limit_s(roofline.Work(0, 0, 2**28)) == 2.0**9
    assert any("span" in line for line in roofline.report(found))  # the samples spread


def line(name, *events):
    return SimpleNamespace(name=name, events=events)


def event(name, start_ns, duration_ns, **stats):
    times = {"start_ns": start_ns, "duration_ns": duration_ns}
    return SimpleNamespace(name=name, **times, stats=list(stats.items()))


def test_kernels_gaps_and_layers_of_a_gpu_s_trace():
    stream = line(
        "Stream #1",
        event("gemm", 0, 30, hlo_op="dot.1"),
        event("gemm", 50, 30, hlo_op="dot.1"),
        event("add", 70, 20, hlo_op="fusion"),  # 10 of it beside the product
    )
    device = [stream, line("XLA Ops", event("dot.1", 0, 30, hlo_op="dot.1"))]
    host = [line("main", event("cuLaunchKernel", 0, 5))]
    lines = {"/device:GPU:0": device, "/host:CPU": host}
    planes = [SimpleNamespace(name=name, lines=lines[name]) for name in lines]
    hlo = '%dot.1 = f32[] dot(), metadata={op_name="jit(f)/transpose(jvp(CNN))/conv1/dot"}'
    hlo += '\n%dot.2 = f32[] dot(), metadata={op_name="jit(f)/jvp(CNN)/Block_0/conv1/dot"}'
    layers = trace.layers_of(hlo, ["conv1", "Block_0"])
    assert layers == {"dot.1": "conv1", "dot.2": "Block_0"}  # names inside of a block repeat
    row = trace.summarize(trace.kernels(planes), 2, layers)
    assert row["kernels_per_step"] == 1.5
    assert row["gap_share"] == pytest.approx(20 / 90)
    assert row["layer_shares"] == {"conv1": pytest.approx(0.75), "other": pytest.approx(0.25)}
    first = {"operation": "dot.1", "layer": "conv1", "per_step": 1.0, "share": 0.75}
    assert row["costliest"][0] == pytest.approx(first)
    assert "dot.1" in step.trace_tables(Results({}, [], {"trace": [ROW | row]}))[1]


def test_kernels_of_a_cpu_are_its_thunks_without_what_holds_them():
    thunks = line("pool", event("x", 0, 9, hlo_op="while.1"), event("x", 1, 2, hlo_op="dot.2"))
    other = line("python", event("f", 0, 9))
    host = SimpleNamespace(name="/host:CPU", lines=[thunks, other])
    assert trace.kernels([host]) == [("dot.2", 1, 3)]


def test_what_the_host_issues_is_counted_in_the_loop_s_body():
    thunks = """
    000: kKernel copy
    001: kWhile while.1
      condition:
        002: kKernel less
      body:
        003: kCommandBuffer graph
          004: kKernel a
          005: kGemm b
        006: kConvolution c
    007: kKernel last
    """
    assert trace.issued_per_step(thunks) == 2
    assert trace.issued_per_step("000: kKernel only") is None


def peer(framework, mode, times) -> list[Benchmark]:
    fields = {"name": peers.TRAIN, "framework": framework, "model": "mlp", "mode": mode}
    rounds = [({"round": i, "load": 2.0}, s) for i, s in enumerate(times)]
    return [Benchmark(samples_s=[99.0, s], details=details, **fields) for details, s in rounds]


def test_peers_are_compared_within_rounds_and_two_speeds_are_shown():
    ours = peer(*peers.OURS, [1.0, 10.0, 1.0, 1.0, 1.0])
    eager = peer("pytorch", "eager", [2.0, 20.0, 2.0, 2.0, 2.0, 2.0])  # we failed in the last
    compiled = peer("pytorch", "torch.compile", [1.0, 1.0, 4.0, 4.0, 4.0])
    every = ours + eager + compiled + peer("mnist_jax", "one dispatch a step", [3.0] * 5)
    found = Results({"platform": "cpu", "load": [0], "cores": 2}, every, {})
    assert [peers.best(found, x) for x in ("mlp", "cnn")] == [("eager", [0.5] * 5), None]
    table, _, warning = peers.report(found)
    assert "1,000 or 4,000 (0.25; 0.25 to 10.00)" in table
    assert table.index("one dispatch a step") < table.index("pytorch") and "2.00 a core" in warning


def test_a_seed_that_misses_the_target_counts_as_infinite():
    row = {"model": "mlp", "preset": "fast", "target": 0.9, "compile_s": 1.0}
    rows = [row | {"reached_s": reached_s} for reached_s in (3.0, None, None)]
    found = Results({}, [], {"time_to_accuracy": rows})
    [times] = time_to_accuracy.times_of(found).values()
    assert times == [3.0, math.inf, math.inf]
    assert re.search(r"1 of 3 \| inf +\| +3 to inf", time_to_accuracy.report(found)[0])
    assert time_to_accuracy.report(Results({}, [], {})) == [""]  # every network failed
