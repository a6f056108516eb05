from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import launch, results, roofline
from mnist_jax import steps
from mnist_jax.models import CNN, MLP, LogisticRegression


@pytest.mark.parametrize(
    ("model", "direct", "winograd"),
    [
        (LogisticRegression(), 4 * 784 * 10, 4 * 784 * 10),
        (MLP(hidden_sizes=(20,)), 4 * 784 * 20 + 6 * 20 * 10, 4 * 784 * 20 + 6 * 20 * 10),
        # The tutorial's own count of its CNN: 54.6 GFLOP for a batch of 100.
        (CNN(), 545.8e6, 166.3e6),
    ],
)
def test_the_operations_of_a_step(model, direct, winograd):
    for platform, expected in (("gpu", direct), ("cpu", winograd)):
        work = roofline.train_work(model, 7, platform)
        assert work.flops / 7 == pytest.approx(expected, rel=0.005)
        assert work.direct_flops / 7 == pytest.approx(direct, rel=0.005)


def test_the_operations_agree_with_the_compilers_own_count():
    model, batch_size = MLP(), 50
    params = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    shape = (batch_size,)
    batch = steps.Batch(
        image=jax.ShapeDtypeStruct((*shape, 28, 28, 1), jnp.float32),
        label=jax.ShapeDtypeStruct(shape, jnp.int32),
        mask=jax.ShapeDtypeStruct(shape, bool),
    )
    gradient = jax.jit(jax.grad(partial(steps.loss_fn, model=model), has_aux=True))
    cost = gradient.lower(params, batch).cost_analysis()
    # XLA counts the activations' and the loss's few operations as well.
    work = roofline.train_work(model, batch_size, "cpu")
    assert 1 <= cost["flops"] / work.flops < 1.02


def test_bytes_are_those_of_parameters_and_outputs():
    work = roofline.train_work(LogisticRegression(), 100, "cpu")
    assert work.bytes == 4 * (8 * 7850 + 4 * 100 * 10)


def test_the_table_shows_limits_below_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "MATRIX_SIZE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    file = tmp_path / "roofline.json"
    words = ["--models", "logistic", "--repeats", "2", "--output", str(file)]
    monkeypatch.setattr("sys.argv", ["roofline", *words])
    assert launch.command(roofline.Options, roofline.measure, "roofline", "") == 0
    assert "logistic" in capsys.readouterr().out
    _, benchmarks = results.read(file)
    assert [b.name for b in benchmarks] == ["matrix_product", "copy", "train_step"]
    assert [len(b.samples_s) for b in benchmarks[:2]] == [2, 2]
    assert benchmarks[2].details["limit_s"] > 0
