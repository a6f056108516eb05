import jax
import pytest

from benchmarks import launch, results, roofline
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


@pytest.mark.parametrize(
    ("model", "above"), [(LogisticRegression(), 0.01), (MLP(), 0.01), (CNN(), 0.07)]
)
def test_the_operations_agree_with_the_compilers_own_count(model, above):
    # XLA counts activations, the loss and the transforms as well.
    work = roofline.train_work(model, 50, "cpu")
    assert 1 <= roofline.counted_by_xla(model, 50) / work.flops < 1 + above


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


@pytest.mark.parametrize("name", ["conv2", "dense1"])
def test_the_compiler_takes_no_work_out_of_a_layer_s_loop(name, monkeypatch):
    layer = roofline.alone(CNN(hidden_sizes=(8,)), 2)[name]
    caught = []
    monkeypatch.setattr(roofline.timing, "measure", lambda call, state, **_: caught.append(call))
    with pytest.raises(TypeError):  # nothing was measured
        layer.time(first=False, samples=1)
    closed = dict(zip(caught[0].__code__.co_freevars, caught[0].__closure__, strict=True))
    run, args = (closed[name].cell_contents for name in ("run", "args"))
    shapes = jax.eval_shape(lambda args: args, args)
    text = run.lower((layer.y, (layer.params, layer.x)), shapes, 3).compile().as_text()
    outside = text[text.index("ENTRY") :].splitlines()
    work = ("dot(", "custom-call(", "fusion(")
    assert not [line for line in outside if "copy" not in line and any(w in line for w in work)]


def test_the_bytes_of_a_layer_alone():
    layers = roofline.alone(MLP(hidden_sizes=(20,)), 7)
    kernel, x, y = 784 * 20 + 20, 7 * 784, 7 * 20
    assert layers["dense1"].bytes(first=True) == 4 * (3 * kernel + 2 * x + 2 * y)
    assert layers["dense1"].bytes(first=False) == 4 * (3 * kernel + 3 * x + 2 * y)


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
