"""`fit` from end to end: on the digits of scikit-learn, small and offline; briefly on MNIST."""

import contextlib
import json
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import rows_of

from mnist_jax import MODELS, Callback, errors, evaluate, fit, load_run
from mnist_jax.errors import CheckpointError, InterruptedRunError, NonFiniteError, UsageError
from mnist_jax.models import LogisticRegression
from mnist_jax.runs.results import params_sha256
from mnist_jax.runs.run_dir import make_default_folder

MLP = {"model": "mlp", "hidden_sizes": (8,)}


def test_a_run_learns_and_leaves_its_files(config):
    fields = {"epochs": 10, "schedule": "onecycle", "max_steps": 999}  # over all of the epochs
    result = fit(config(model="mlp", **fields), import_s=1e6)
    folder, record = result.workdir, result.record
    files = {"config.json", "environment.json", "metrics.jsonl", "result.json", "manifest.sha256"}
    assert {p.name for p in folder.iterdir()} - {".lock"} == {*files, "checkpoints"}
    assert record == json.loads((folder / "result.json").read_text())
    assert record["test_accuracy"] == record["test_correct"] / 360 > 0.8
    assert record["dataset"] == record["config"]["dataset"] == "digits"
    assert record["config"]["hidden_sizes"] == [256, 128, 64, 32]  # resolved
    assert (record["epochs"], record["steps"]) == (10, 150)  # 1,437 images make 15 batches
    seconds = {"import_s", "data_s", "compile_s", "train_s", "eval_s", "total_s"}
    assert set(record["timings"]) == seconds
    assert record["timings"]["total_s"] > record["timings"]["import_s"] == 1e6
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows] == list(range(15, 151, 15))
    assert rows[-1]["test/accuracy"] == record["test_accuracy"]
    assert rows[-1]["train/accuracy"] == record["train_accuracy"]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert sum(row["eval_s"] for row in rows) == pytest.approx(record["timings"]["eval_s"])


@pytest.mark.mnist
@pytest.mark.parametrize(
    ("model", "fields", "accuracy"),
    [
        pytest.param("logistic", {"epochs": 2}, 0.91, marks=pytest.mark.campaign),
        ("mlp", {"epochs": 1}, 0.95),
        pytest.param("cnn", {"max_steps": 60}, 0.93, marks=pytest.mark.campaign),
    ],
)
def test_a_short_run_on_mnist_reaches(model, fields, accuracy, mnist_dir, config):
    record = fit(config(model=model, dataset="mnist", manual_dir=mnist_dir, **fields)).record
    assert record["test_count"] == 10_000
    assert record["test_accuracy"] >= accuracy


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "seeds": 2}])
def test_the_parameters_come_back_from_a_complete_run(config, fields):
    result, again = fit(config(**fields)), fit(config(**fields))
    assert again.record == result.record
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    members = load_run(result.workdir).members
    digests = [params_sha256(params) for params, _ in members]
    assert np.ravel(result.record["params_sha256"]).tolist() == digests
    stacked = jax.tree.map(lambda x: x if "seeds" in fields else x[None], result.params)
    own = [jax.tree.map(lambda x, m=m: x[m], stacked) for m in range(len(members))]
    assert list(map(params_sha256, own)) == digests
    max(result.workdir.glob("checkpoints/*.safetensors")).write_bytes(b"")  # the rest is older
    with pytest.raises(CheckpointError, match=r"30.safetensors is damaged .* is of step 15; r"):
        fit(config(**fields))
    _, warning = load_run(result.workdir).warnings
    assert warning.endswith("has lost its last checkpoint: this one is of step 15")


def test_a_run_starts_from_given_parameters_of_its_shape(config, tmp_path):
    source = fit(config(ema_decay=0.9, workdir=tmp_path / "source", **MLP))
    wide = {**MLP, "hidden_sizes": (9,)}
    with pytest.raises(UsageError, match=r"an array has shape \(8,\) in place of \(9,\)"):
        fit(config(**wide), init_params=source.params)
    with pytest.raises(UsageError, match="the initial parameters are not those of the model"):
        fit(config(), init_params=source.params)
    with pytest.raises(UsageError, match=r"is a run of another network .*\[8\], expected .*9"):
        fit(config(init_from=source.workdir, **wide))
    with pytest.raises(UsageError, match="the model has no array ema/dense1/"):
        fit(config(init_from=source.workdir))
    with pytest.raises(UsageError, match="holds no run"):
        fit(config(init_from=source.workdir.parent, **MLP))
    assert not config().workdir.exists()
    frozen = {**MLP, "learning_rate": 1e-30, "max_steps": 1}
    own = fit(config(**frozen), init_params=source.params).record
    folder = {"init_from": source.workdir, "workdir": tmp_path / "folder"}
    two = fit(config(seeds=2, **folder, **frozen)).record
    digest = source.record["params_sha256"]
    assert (own["params_sha256"], two["params_sha256"]) == (digest, [digest] * 2)
    assert own["test_correct"] == source.record["test_correct"]
    other = r"differs in init_from \(was 'arrays-\w+', now None\); .* command: .* --workdir=/.*/run"
    for _ in range(2):  # it stays
        with pytest.raises(UsageError, match=other):
            fit(config(**frozen))
    max(source.workdir.glob("checkpoints/*.safetensors")).write_bytes(b"")
    older, _ = load_run(source.workdir).members[0]
    with pytest.warns(UserWarning, match=r"is damaged .* is used instead"):
        run = fit(config(**folder | {"workdir": tmp_path / "older"}, **frozen), callbacks=())
    assert run.record["params_sha256"] == params_sha256(older) != digest
    shutil.rmtree(source.workdir)  # a run that has begun needs it no more
    assert fit(config(seeds=2, **folder, **frozen)).record == two
    (tmp_path / "folder" / "result.json").unlink()  # as if it had been interrupted
    assert fit(config(seeds=2, **folder, **frozen)).record["params_sha256"] == [digest] * 2


RECIPE = {"model": "mlp", "max_steps": 18, "hidden_sizes": (32,), "preset": "best"}
RECIPE |= {"dropout": 0.2, "ema_decay": 0.9, "label_smoothing": 0.1}
CNN = {"model": "cnn", "max_steps": 4, "batch_size": 20}


@pytest.mark.parametrize("fields", [RECIPE, pytest.param(CNN, marks=pytest.mark.campaign)])
def test_the_number_of_steps_per_call_changes_no_bit(config, tmp_path, fields):
    folders = {n: tmp_path / str(n) for n in (1, 100, "auto")}
    runs = (config(steps_per_call=n, workdir=folders[n], **fields) for n in folders)
    records = [fit(run).record for run in runs]
    assert len({(record["params_sha256"], record["train_accuracy"]) for record in records}) == 1


def test_max_steps_ends_within_an_epoch_or_after_one_batch_as_large_as_the_split(config, tmp_path):
    result = fit(config(max_steps=20))
    assert [(row["epoch"], row["step"]) for row in rows_of(result.workdir)] == [(1, 15), (2, 20)]
    assert (result.record["epochs"], result.record["steps"]) == (2, 20)
    whole = fit(config(max_steps=1, batch_size=1437, workdir=tmp_path / "whole")).record
    assert (whole["epochs"], whole["steps"]) == (1, 1)  # no empty epoch after a complete one


def test_runs_of_the_same_second_get_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(config(workdir=None, epochs=1))
    assert len({make_default_folder("digits", "logistic") for _ in range(3)}) == 3
    assert len([*Path("runs").iterdir()]) == 4
    shutil.rmtree("runs")
    Path("runs").symlink_to("gone")
    with pytest.raises(errors.DeviceError, match="cannot write the run's folder runs/"):
        fit(config(workdir=None, epochs=1))


def steps_kept(folder) -> list[int]:
    names = (path.stem for path in (folder / "checkpoints").glob("*.safetensors"))
    return sorted(int(name.rpartition("-")[2]) for name in names)


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_state(config):
    for _ in range(2):  # the same command fails again, at the same step
        with pytest.raises(NonFiniteError, match=r"at step 2 .*learning_rate 1e\+38"):
            fit(config(learning_rate=1e38, steps_per_call=1, checkpoint_every=0, **MLP))
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


def test_jax_settings_change_no_number(config, tmp_path):
    numbers = jax.enable_x64(True), jax.threefry_partitionable(False)
    numbers += (jax.numpy_dtype_promotion("strict"),)
    checks = jax.numpy_rank_promotion("raise"), jax.transfer_guard("disallow")
    fields = {"dropout": 0.2, "max_steps": 5, "ema_decay": 0.9, **MLP}
    plain = fit(config(**fields)).record
    for name, settings in {"all": (*numbers, *checks), "NaNs": [jax.debug_nans(True)]}.items():
        with contextlib.ExitStack() as stack:
            stack.callback(jax.config.update, "jax_random_seed_offset", 0)
            jax.config.update("jax_random_seed_offset", 5)
            for setting in settings:
                stack.enter_context(setting)
            other = fit(config(workdir=tmp_path / name, **fields)).record
            assert evaluate(tmp_path / name)["accuracy"] == plain["test_accuracy"]
        assert other["params_sha256"] == plain["params_sha256"], name


@pytest.mark.campaign
def test_without_jit_a_learner_sees_values_and_where_a_nan_is_made(config, monkeypatch, tmp_path):
    """JAX's own settings are respected: the step runs as Python, with concrete values."""
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
        diverging = config(learning_rate=1e38, workdir=tmp_path / "diverging")
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"nan.* encountered in"):
            fit(diverging)


def test_bfloat16_trains_on_a_cpu_and_all_callbacks_get_all_warnings(config, tmp_path, no_network):
    watches = [mock.create_autospec(Callback, instance=True) for _ in range(2)]
    fields = {"precision": "bfloat16", "dataset": "auto", "data_dir": tmp_path / "empty"}
    result = fit(config(model="mlp", epochs=3, **fields), callbacks=watches)
    assert result.record["config"]["dataset"] == "digits"
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype("float32")}
    assert result.record["test_accuracy"] > 0.3
    other, slower = result.record["warnings"]
    assert "digits instead of MNIST: " in other and slower.startswith("bfloat16 on a CPU is slower")
    for watch in watches:
        assert watch.on_warning.call_args_list == [mock.call(other), mock.call(slower)]


def test_fit_shows_the_run_unless_callbacks_are_given(config, tmp_path, capsys):
    result = fit(config(epochs=1))
    shown = capsys.readouterr().out.splitlines()
    correct = result.record["test_correct"]
    line = f"test accuracy: {100 * correct / 360:.2f} % ({correct}/360)"
    assert shown[-1] == line and repr(result) == f"<Result {line}, in {result.workdir}>"
    in_a_thread = ThreadPoolExecutor(1).submit  # which cannot handle signals
    in_a_thread(fit, config(epochs=1, workdir=tmp_path / "other"), callbacks=()).result()
    assert capsys.readouterr().out == ""


def test_a_signal_saves_the_run_and_a_notebook_shows_one_line(config, tmp_path):
    for place, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 1):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        before = signal.signal(number, usual)  # another test may have left one of its own
        watch = mock.Mock(on_chunk_end=lambda *_, number=number: signal.raise_signal(number))
        message = f"interrupted at step {2 * place}; to resume, "
        with pytest.raises(InterruptedRunError, match=message) as caught:
            fit(config(steps_per_call=2), callbacks=[watch])
        assert caught.value._render_traceback_() == [str(caught.value)]  # IPython calls it
        assert caught.value.exit_status == 128 + number
        assert signal.signal(number, before) == usual
    early = mock.Mock(on_epoch_end=lambda row: row.clear() or signal.raise_signal(signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="interrupted at step 15; "):
        fit(config(), callbacks=[early])
    assert fit(config(), callbacks=[early]).record["steps"] == 30  # after the last step it is late
    early = mock.Mock(on_train_begin=lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(InterruptedRunError, match=r"interrupted at step [1-9]\d*; to resume"):
        fit(config(workdir=tmp_path / "new"), callbacks=[early])
    early = mock.Mock(on_train_begin=mock.Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        fit(run := config(workdir=tmp_path / "none", ema_decay=0.9), callbacks=[early])
    [(params, _)] = load_run(run.workdir).members  # not the EMA of no steps
    assert params["logits"]["kernel"].any()


def test_a_run_that_has_learned_nothing_warns(config, capsys):
    result = fit(config(model="mlp", learning_rate=(0.001, 10.0)))  # the first has learned
    [warning] = result.record["warnings"]
    assert re.fullmatch(r"the train accuracy .* is \d+.\d\d %, hardly above guessing; .*", warning)
    assert capsys.readouterr().err == f"warning: {warning}\n"


def test_callbacks_see_a_run_in_order_and_a_misspelt_hook_is_an_error(config):
    with pytest.raises(TypeError, match="Logger: Callback has no on_epoch_ended"):
        type("Logger", (Callback,), {"on_epoch_ended": print})
    watch = mock.create_autospec(Callback, instance=True)
    result = fit(config(epochs=1, steps_per_call=8), callbacks=[watch])
    names = ["fit_begin", "data_loaded", "train_begin", "epoch_begin"]
    names += ["steps", "chunk_end"] * 2 + ["epoch_end", "train_end"]
    assert [name.removeprefix("on_") for name, _, _ in watch.method_calls] == [*names, "close"]
    watch.on_epoch_begin.assert_called_once_with(1, 0, 15)
    chunks = [call.args for call in watch.on_chunk_end.call_args_list]
    counts = [(*numbers, metrics.count) for *numbers, metrics, _ in chunks]
    assert counts == [(1, 8, 15, 800), (1, 15, 15, 1437)]
    assert 0 < chunks[0][-1] < chunks[1][-1]  # the time adds up
    watch.on_epoch_end.assert_called_once_with(*rows_of(result.workdir))
    watch.on_train_end.assert_called_once_with(result)


@pytest.mark.parametrize("fields", [{}, {"seeds": 2}])
def test_on_steps_gets_each_steps_values_once_and_in_order(config, tmp_path, fields):
    plain, found = fit(config(**fields)), []
    for n in (1, "auto"):
        run, watch = config(steps_per_call=n, workdir=tmp_path / f"{n}", **fields), mock.Mock()
        assert fit(run, callbacks=[watch]).record["params_sha256"] == plain.record["params_sha256"]
        firsts, calls = zip(*(call.args for call in watch.on_steps.call_args_list), strict=True)
        ends = np.cumsum([values["loss"].shape[-1] for values in calls])
        assert firsts == (0, *ends[:-1]) and ends[0] == (n if n == 1 else 2)  # two are timed first
        values = jax.tree.map(lambda *parts: np.concatenate(parts, -1), *calls)
        found.append((values["loss"], values["grad_norm"]))
    np.testing.assert_array_equal(*found)
    loss, grad_norm = found[0]
    assert loss.shape == grad_norm.shape == (*fields.values(), 30)
    mean = np.average(loss[..., 15:], axis=-1, weights=[100] * 14 + [37])
    np.testing.assert_allclose(mean, rows_of(plain.workdir)[1]["train/loss"], rtol=1e-5)
    assert np.all(grad_norm > 0)


def test_params_sha256_depends_on_names_shapes_dtypes_and_values():
    a, b = np.zeros((2, 3), np.float32), np.ones(4, np.float32)
    variants = [{"a": a, "b": b}, {"b": b, "c": a}, {"a": a.reshape(3, 2), "b": b}]
    variants += [{"a": a.astype(np.int32), "b": b}, {"a": a, "b": np.float32([1, 1, 1, 2])}]
    assert len({params_sha256(v) for v in variants}) == 5
    assert params_sha256({"b": b, "a": a}) == params_sha256(variants[0])
