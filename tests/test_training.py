"""`fit` from end to end, on the digits that come with scikit-learn: small, and offline."""

import json
from types import SimpleNamespace
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from shared import rows_of

from mnist_jax import MODELS, Callback, fit, load_run, steps
from mnist_jax.compiled_steps import make_steps
from mnist_jax.errors import CheckpointError, NonFiniteError, UsageError
from mnist_jax.models import LogisticRegression
from mnist_jax.parallel import mesh
from mnist_jax.runs.results import params_sha256


def test_a_run_learns_and_leaves_its_files(config):
    result = fit(config(model="mlp", epochs=10))
    folder, record = result.workdir, result.record
    files = {"config.json", "environment.json", "metrics.jsonl", "result.json", "manifest.sha256"}
    assert {p.name for p in folder.iterdir()} - {".lock"} == {*files, "checkpoints"}
    assert record == json.loads((folder / "result.json").read_text())
    assert record["test_accuracy"] == record["test_correct"] / 360 > 0.9
    assert record["dataset"] == record["config"]["dataset"] == "digits"
    assert record["config"]["hidden_sizes"] == [256, 128, 64, 32]  # resolved
    assert (record["epochs"], record["steps"]) == (10, 150)  # 1,437 images make 15 batches
    assert record["params_sha256"] == params_sha256(result.params)
    seconds = {"import_s", "data_s", "compile_s", "train_s", "eval_s", "total_s"}
    assert set(record["timings"]) == seconds
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows] == list(range(15, 151, 15))
    assert rows[-1]["test/accuracy"] == record["test_accuracy"]
    assert rows[-1]["train/accuracy"] == record["train_accuracy"]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_initial_parameters_have_the_same_bits_when_fully_optimized(name):
    """The initial state comes from a program that XLA optimizes less, to compile faster."""
    key, tx, model = jax.random.key(3), optax.adam(1e-3), MODELS[name]()
    devices = mesh.make_mesh(jax.devices()[:1])
    sizes = {"train_size": 1, "batch_size": 1, "step_config": steps.StepConfig()}
    quick = make_steps(model, tx, devices, **sizes).init_state
    full = jax.jit(lambda key: steps.init_state(key, model=model, tx=tx))
    for ours, theirs in zip(*map(jax.tree.leaves, (quick(key), full(key))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "seeds": 2}])
def test_the_parameters_come_back_from_a_complete_run(config, fields):
    result, again = fit(config(**fields)), fit(config(**fields))
    assert again.record == result.record
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    members = load_run(result.workdir).members
    digests = [params_sha256(member["params"]) for member in members]
    assert np.ravel(result.record["params_sha256"]).tolist() == digests
    if "seeds" not in fields:
        assert params_sha256(result.params) == digests[0]
    else:
        own = [jax.tree.map(lambda x, m=m: x[m], result.params) for m in range(2)]
        assert list(map(params_sha256, own)) == digests


MLP = {"model": "mlp", "hidden_sizes": (8,)}


@pytest.fixture
def source(config, tmp_path):
    """A run to start from."""
    return fit(config(ema_decay=0.9, workdir=tmp_path / "source", **MLP))


def test_a_run_starts_from_given_parameters(config, tmp_path, source):
    frozen = {**MLP, "learning_rate": 1e-30, "max_steps": 1}
    own = fit(config(**frozen), init_params=source.params).record
    folder = {"init_from": source.workdir, "workdir": tmp_path / "folder"}
    two = fit(config(seeds=2, **folder, **frozen)).record
    digest = source.record["params_sha256"]
    assert (own["params_sha256"], two["params_sha256"]) == (digest, [digest] * 2)
    assert own["test_correct"] == source.record["test_correct"]


def test_parameters_of_another_shape_are_refused_before_a_folder_is_made(config, source):
    wide = {**MLP, "hidden_sizes": (9,)}
    with pytest.raises(UsageError, match=r"initial dense1/bias has shape \(8,\); it needs \(9,\)"):
        fit(config(**wide), init_params=source.params)
    with pytest.raises(UsageError, match="the initial parameters are not those of the model"):
        fit(config(), init_params=source.params)
    with pytest.raises(CheckpointError, match=r"bias is float32\[8\], expected float32\[9\]"):
        fit(config(init_from=source.workdir, **wide))
    with pytest.raises(UsageError, match="holds no run"):
        fit(config(init_from=source.workdir.parent, **MLP))
    assert not config().workdir.exists()


RECIPE = {"preset": "best", "dropout": 0.2, "ema_decay": 0.9, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "logistic", "max_steps": 18},
        {"model": "mlp", "max_steps": 18, "hidden_sizes": (32,), **RECIPE},
        pytest.param(
            {"model": "cnn", "max_steps": 4, "batch_size": 20}, marks=pytest.mark.campaign
        ),
    ],
    ids=lambda fields: fields["model"],
)
def test_the_number_of_steps_per_call_changes_no_bit(config, tmp_path, fields):
    records = [
        fit(config(steps_per_call=n, workdir=tmp_path / str(n), **fields)).record
        for n in (1, 3, 100, "auto")
    ]
    assert len({record["params_sha256"] for record in records}) == 1
    assert len({record["train_accuracy"] for record in records}) == 1


@pytest.mark.parametrize("steps_per_call", [7, "auto"])
def test_loops_of_static_length_give_the_same_result(config, tmp_path, monkeypatch, steps_per_call):
    """As on an accelerator: an epoch and a partial one, each compiled with its own length."""
    leaves = jax.tree.leaves(fit(config(model="mlp", max_steps=20)).params)
    monkeypatch.setattr("mnist_jax.compiled_steps.dynamic_loop_bound", lambda device: False)
    calls = {"steps_per_call": steps_per_call, "workdir": tmp_path / "static"}
    result = fit(config(model="mlp", max_steps=20, **calls))
    assert result.record["steps"] == 20
    for leaf, want in zip(jax.tree.leaves(result.params), leaves, strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-6)


def test_max_steps_ends_within_an_epoch_with_its_metrics(config, tmp_path):
    result = fit(config(max_steps=20))
    assert [(row["epoch"], row["step"]) for row in rows_of(result.workdir)] == [(1, 15), (2, 20)]
    assert (result.record["epochs"], result.record["steps"]) == (2, 20)
    whole = fit(config(max_steps=15, workdir=tmp_path / "whole"))
    assert whole.record["epochs"] == 1  # no empty epoch after a complete one


def test_runs_of_the_same_second_get_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {fit(config(workdir=None, epochs=1)).workdir for _ in range(3)}
    assert len(folders) == 3


def steps_kept(folder) -> list[int]:
    names = (path.stem for path in (folder / "checkpoints").glob("*.safetensors"))
    return sorted(int(name.rpartition("-")[2]) for name in names)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_state(config):
    for _ in range(2):  # the same command fails again, at the same step
        with pytest.raises(NonFiniteError, match=r"at step 2 .*learning_rate 1e\+38"):
            fit(config(model="mlp", learning_rate=1e38, steps_per_call=1, checkpoint_every=0))
        assert steps_kept(config().workdir) == [0, 1]


def test_a_gradient_that_is_not_finite_is_noticed_at_a_finite_loss(config, monkeypatch):
    class Root(LogisticRegression):
        @nn.compact
        def __call__(self, x, *, train=False):  # the gradient of a square root at 0 is infinite
            return jnp.sqrt(self.param("logits", nn.initializers.zeros, (10,))) + 0 * x[:, 0, 0]

    monkeypatch.setitem(MODELS, "logistic", Root)
    with pytest.raises(NonFiniteError, match="at step 1 "):
        fit(config())
    assert steps_kept(config().workdir) == [0]


def test_jax_finds_the_operation_that_made_a_nan(config):
    """With JAX's own settings, which a run leaves as they are."""
    with (
        jax.disable_jit(),
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"nan.* encountered in"),
    ):
        fit(config(model="mlp", learning_rate=1e38, hidden_sizes=(4,)))


@pytest.mark.parametrize(
    "setting",
    [
        jax.enable_x64(True),
        jax.threefry_partitionable(False),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        jax.debug_nans(True),
    ],
    ids=("x64", "threefry", "rank promotion", "transfer guard", "debug NaNs"),
)
def test_jax_settings_change_no_number(config, tmp_path, setting):
    fields = {"model": "mlp", "dropout": 0.2, "max_steps": 5}
    plain = fit(config(**fields, workdir=tmp_path / "plain"))
    with setting:
        other = fit(config(**fields))
    assert other.record["params_sha256"] == plain.record["params_sha256"]


def test_a_learner_can_step_through_without_jit(config, monkeypatch):
    """JAX_DISABLE_JIT is respected: the step runs as Python, with concrete values."""
    seen = []

    class Printing(LogisticRegression):
        @nn.compact
        def __call__(self, x, *, train=False):
            if not isinstance(x, jax.core.Tracer):
                seen.append(x.shape)
            return nn.Dense(10, name="logits")(x.reshape((len(x), -1)))

    monkeypatch.setitem(MODELS, "logistic", Printing)
    with jax.disable_jit():
        fit(config(max_steps=2))
    assert (250, 28, 28, 1) in seen  # evaluation; the gradient of a step is traced


def test_deterministic_names_options_that_xla_knows():
    """They are used on a GPU only; XLA would refuse a wrong name here too."""
    options = mesh.DETERMINISTIC_OPTIONS
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    assert mesh.compiler_options(jax.devices()[0], deterministic=True) is None
    gpu = SimpleNamespace(platform="gpu")
    assert mesh.compiler_options(gpu, deterministic=True) == options  # pyright: ignore
    assert mesh.compiler_options(gpu, deterministic=False) is None  # pyright: ignore


def test_a_batch_as_large_as_the_split_trains(config):
    assert fit(config(batch_size=1437, epochs=2)).record["steps"] == 2


def test_bfloat16_trains_on_a_cpu_with_float32_parameters_and_a_warning(config):
    watch = mock.create_autospec(Callback, instance=True)
    result = fit(config(model="mlp", precision="bfloat16", epochs=3), callbacks=[watch])
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype("float32")}
    assert result.record["test_accuracy"] > 0.3
    [warning] = result.record["warnings"]
    watch.on_warning.assert_called_once_with(warning)


def test_callbacks_see_a_run_in_order(config):
    watch = mock.create_autospec(Callback, instance=True)
    result = fit(config(epochs=1, steps_per_call=8), callbacks=[watch])
    names = ["fit_begin", "data_loaded", "train_begin", "epoch_begin"]
    names += ["steps", "chunk_end"] * 2 + ["epoch_end", "train_end"]
    names = [f"on_{name}" for name in names]
    assert [name for name, _, _ in watch.method_calls] == [*names, "close"]
    watch.on_epoch_begin.assert_called_once_with(1, 0, 15)
    chunks = [call.args for call in watch.on_chunk_end.call_args_list]
    counts = [(*numbers, metrics.count) for *numbers, metrics, _ in chunks]
    assert counts == [(1, 8, 15, 800), (1, 15, 15, 1437)]
    assert 0 < chunks[0][-1] < chunks[1][-1]  # the time adds up
    watch.on_epoch_end.assert_called_once_with(*rows_of(result.workdir))
    watch.on_train_end.assert_called_once_with(result)


class Log(Callback):
    """Keeps the values of every step, (steps,) or (members, steps) each."""

    def __init__(self):
        self.loss, self.grad_norm = [], []

    def on_steps(self, first, values):
        assert first == sum(found.shape[-1] for found in self.loss)
        self.loss.append(values["loss"])
        self.grad_norm.append(values["grad_norm"])


@pytest.mark.parametrize("fields", [{}, {"seeds": 2}])
def test_on_steps_gets_each_steps_values_once_and_in_order(config, tmp_path, fields):
    plain, found = fit(config(**fields)), []
    for n in (1, 4, "auto"):
        log = Log()
        result = fit(config(steps_per_call=n, workdir=tmp_path / f"{n}", **fields), callbacks=[log])
        assert result.record["params_sha256"] == plain.record["params_sha256"]
        found.append((np.concatenate(log.loss, -1), np.concatenate(log.grad_norm, -1)))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    loss, grad_norm = found[0]
    assert loss.shape == grad_norm.shape == (*fields.values(), 30)
    mean = np.average(loss[..., 15:], axis=-1, weights=[100] * 14 + [37])
    np.testing.assert_allclose(mean, rows_of(plain.workdir)[1]["train/loss"], rtol=1e-5)
    assert np.all(grad_norm > 0)


def test_params_sha256_depends_on_names_shapes_dtypes_and_values():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    variants = [
        base,
        {"b": base["b"], "c": base["a"]},
        {**base, "a": np.zeros((3, 2), np.float32)},
        {**base, "a": np.zeros((2, 3), np.int32)},
        {**base, "b": np.array([1, 1, 1, 2], np.float32)},
    ]
    assert len({params_sha256(v) for v in variants}) == len(variants)
    assert params_sha256({"b": base["b"], "a": base["a"]}) == params_sha256(base)
