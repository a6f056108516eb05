"""--profile: which call is traced, and what is printed of it."""

import jax
import jax.numpy as jnp

from mnist_jax.callbacks import Result
from mnist_jax.metrics import Metrics
from mnist_jax.reporting.profiling import Profiler, operation_seconds

METRICS = Metrics.zeros()
X = jnp.ones((300, 300))


def other() -> None:
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x).sum())(X))


def second_call() -> None:
    jax.block_until_ready(jax.jit(lambda x: jnp.sort(x))(X))


def traced(folder) -> set[str]:
    return {name.partition(".")[0] for name in operation_seconds(folder)}


def test_the_second_call_is_traced_and_its_costliest_operations_are_printed(tmp_path, capsys):
    profiler = Profiler(tmp_path / "trace")
    profiler.on_epoch_begin(1, 0, 6)
    for step, call in ((2, other), (4, second_call), (6, other)):
        call()
        profiler.on_chunk_end(1, step, 6, METRICS, 0.1)
    profiler.on_epoch_begin(2, 0, 6)
    profiler.on_train_end(Result({}, {}, {}, tmp_path))
    profiler.close()
    assert traced(tmp_path / "trace") == {"sort"}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"profile: {tmp_path / 'trace'}"
    assert out[3].split()[1] == "100.0%" and "sort" in out[3]


def test_neither_a_single_call_nor_an_evaluation_after_it_is_traced(tmp_path, capsys):
    profiler = Profiler(tmp_path)
    profiler.on_epoch_begin(1, 0, 2)
    profiler.on_chunk_end(1, 2, 2, METRICS, 0.1)  # the call was the whole epoch
    profiler.on_train_end(Result({}, {}, {}, tmp_path))  # of a shorter run
    assert "no trace, because the train steps were called less" in capsys.readouterr().out
    other()
    profiler.on_epoch_begin(2, 0, 2)
    second_call()
    profiler.close()  # also if the run fails here
    assert traced(tmp_path) == {"sort"}
