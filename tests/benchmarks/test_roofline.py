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
    assert work.bytes == 4 * (9 * 7850 + 4 * 100 * 10)


def test_a_step_of_the_cnn_is_three_forward_passes_but_for_the_first_layer_s_input():
    work = roofline.train_work(CNN(), 1, "gpu")
    first = roofline.works(CNN(), 1, "gpu")["conv1"]
    assert work.direct_flops == pytest.approx(3 * 182.2e6 - first.direct_flops / 2, rel=0.01)


def test_every_layer_is_timed_alone():
    model = CNN(hidden_sizes=(4,))
    layers = roofline.alone(model, 2)
    works = roofline.works(model, 2, "cpu")
    assert [*layers, roofline.UPDATE] == list(works)
    assert layers["conv2"].x.shape == (2, 28, 28, 64)
    assert layers["dense1"].y.shape == (2, 4)
    assert layers["logits"].time(first=False, samples=1).samples_s[0] > 0


def test_the_compiler_takes_no_work_out_of_a_layer_s_loop():
    """A hundred turns of a layer's passes have a hundred times the operations of one."""
    layer = roofline.alone(MLP(hidden_sizes=(64,)), 32)["dense1"]
    seen = []
    original = roofline.time_loop

    def lowered(body, state, samples):
        run = jax.jit(lambda state, steps: jax.lax.fori_loop(0, steps, body, state))
        seen.append(run.lower(state, 3).compile().as_text())
        return original(body, state, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "time_loop", lowered)
        layer.time(first=False, samples=1)
    entry = seen[0][seen[0].index("ENTRY") :]
    assert "dot(" not in entry
    assert seen[0].count("dot(") + seen[0].count("custom-call") + seen[0].count("ynn") >= 3


def test_the_table_shows_limits_below_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "MATRIX_SIZE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    file = tmp_path / "roofline.json"
    words = ["--model", "logistic", "--repeats", "2", "--output", str(file)]
    monkeypatch.setattr("sys.argv", ["roofline", *words])
    assert launch.command(roofline.Options, roofline.measure, "roofline", "") == 0
    assert "logistic" in capsys.readouterr().out
    benchmarks = results.read(file).benchmarks
    names = [(b.name, b.details.get("layer")) for b in benchmarks]
    assert names == [
        ("matrix_product", None),
        ("copy", None),
        ("train_step", None),
        ("layer", "logits"),
        ("layer", "update"),
    ]
    assert all(len(b.samples_s) == 2 for b in benchmarks)
    assert benchmarks[2].details["limit_s"] > 0
