"""--profile: which call is traced."""

import gzip
import json

import jax
import jax.numpy as jnp

from mnist_jax.callbacks import Result
from mnist_jax.metrics import Metrics
from mnist_jax.reporting.profiling import Profiler

METRICS = Metrics.zeros()
X = jnp.ones((300, 300))
OTHER, SECOND = jax.jit(lambda x: jnp.sin(x).sum()), jax.jit(jnp.sort)


def traced(folder) -> set[str]:
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = (event.get("args", {}).get("hlo_op", "call").partition(".")[0] for event in events)
    return {*names} - {"while", "call", "conditional"}


def test_the_second_call_is_traced(tmp_path, capsys):
    profiler = Profiler(tmp_path / "trace")
    profiler.on_epoch_begin(1, 0, 6)
    for step, call in ((2, OTHER), (4, SECOND), (6, OTHER)):
        jax.block_until_ready(call(X))
        profiler.on_chunk_end(1, step, 6, METRICS, 0.1)
    profiler.on_epoch_begin(2, 0, 6)
    profiler.on_train_end(Result({}, {}, {}, tmp_path))
    profiler.close()
    assert traced(tmp_path / "trace") == {"sort"}
    assert capsys.readouterr().out == f"profile: {tmp_path / 'trace'}\n"


def test_neither_a_single_call_nor_an_evaluation_after_it_is_traced(tmp_path, capsys):
    profiler = Profiler(tmp_path)
    profiler.on_epoch_begin(1, 0, 2)
    profiler.on_chunk_end(1, 2, 2, METRICS, 0.1)  # the call was the whole epoch
    profiler.on_train_end(Result({}, {}, {}, tmp_path))  # of a shorter run
    assert "no trace, because the train steps were called less" in capsys.readouterr().out
    jax.block_until_ready(OTHER(X))
    profiler.on_epoch_begin(2, 0, 2)
    jax.block_until_ready(SECOND(X))
    profiler.close()  # also if the run fails here
    assert traced(tmp_path) == {"sort"}
