"""`fit` from end to end, on the digits that ship with scikit-learn: small, and no network."""

import contextlib
import json
import os
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax import MODELS, Config, fit, steps
from mnist_jax.errors import CheckpointError, DeviceError, NonFiniteError, UsageError
from mnist_jax.models import LogisticRegression
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs import run_dir as runs
from mnist_jax.trainer import make_steps
from mnist_jax.training import Callback


@pytest.fixture
def config(data_dir, tmp_path):
    """Makes a Config for a quick run into a folder of the test's own."""

    def make(**fields) -> Config:
        defaults = {"model": "logistic", "dataset": "digits", "epochs": 3, "data_dir": data_dir}
        return Config(**{**defaults, "workdir": tmp_path / "run", **fields})

    return make


def test_a_run_learns_and_leaves_its_files(config):
    result = fit(config(model="mlp", epochs=10))
    folder, record = result.workdir, result.record
    files = {"config.json", "environment.json", "metrics.jsonl", "result.json", "manifest.sha256"}
    assert {p.name for p in folder.iterdir()} - {".lock", ".pid"} == {*files, "checkpoints"}
    assert record == json.loads((folder / "result.json").read_text())
    assert record["test_count"] == 360
    assert record["test_accuracy"] == record["test_correct"] / 360 > 0.9
    assert record["dataset"] == record["config"]["dataset"] == "digits"
    assert (record["epochs"], record["steps"]) == (10, 150)  # 1,437 images make 15 batches
    assert record["params_sha256"] == runs.params_sha256(result.params)
    assert set(record["timings"]) == {
        *("import_s", "data_s", "compile_s", "train_s", "eval_s", "total_s"),
    }
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows] == list(range(15, 151, 15))
    assert rows[-1]["test/accuracy"] == record["test_accuracy"]
    assert rows[-1]["train/accuracy"] == record["train_accuracy"]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(config, tmp_path):
    digests = [
        fit(config(seed=seed, workdir=tmp_path / str(i))).record["params_sha256"]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_parameters_start_at_the_same_bits_in_a_program_that_is_optimized_in_full(name):
    device, key, tx = jax.devices()[0], jax.random.key(3), optax.adam(1e-3)
    model = MODELS[name]()
    quick = make_steps(
        model, tx, device, train_size=1, batch_size=1, recipe=steps.StepConfig()
    ).init_state
    full = jax.jit(lambda key: steps.init_state(key, model=model, tx=tx))
    for ours, theirs in zip(*map(jax.tree.leaves, (quick(key), full(key))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_the_number_of_steps_in_a_call_changes_no_bit(config, tmp_path, model):
    sizes = {"max_steps": 4, "batch_size": 20} if model == "cnn" else {"max_steps": 18}
    records = [
        fit(
            config(model=model, steps_per_call=calls, workdir=tmp_path / str(calls), **sizes)
        ).record
        for calls in (1, 3, 100, "auto")
    ]
    assert len({record["params_sha256"] for record in records}) == 1
    assert len({record["train_accuracy"] for record in records}) == 1


@pytest.mark.parametrize("steps_per_call", [7, "auto"])
def test_programs_of_known_length_give_the_same_result(
    config, tmp_path, monkeypatch, steps_per_call
):
    """As on an accelerator: an epoch and a rest of another length, each compiled for itself."""
    leaves = jax.tree.leaves(fit(config(model="mlp", max_steps=20)).params)
    monkeypatch.setattr("mnist_jax.trainer.dynamic_loop_bound", lambda device: False)
    calls = {"steps_per_call": steps_per_call, "workdir": tmp_path / "static"}
    result = fit(config(model="mlp", max_steps=20, **calls))
    assert result.record["steps"] == 20
    for leaf, want in zip(jax.tree.leaves(result.params), leaves, strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-6)


def test_a_folder_in_use_is_refused_and_left_alone(config, tmp_path):
    class Second(Callback):
        def on_epoch_end(self, row):
            with pytest.raises(UsageError, match="is in use by process"):
                fit(config())

    result = fit(config(), observer=Second())
    assert len((result.workdir / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_killed_before_its_first_epoch_starts_again(config):
    result = fit(config())
    for name in ("result.json", "metrics.jsonl"):
        (result.workdir / name).unlink()
    assert fit(config()).record["params_sha256"] == result.record["params_sha256"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[]"), ("config.json", "\xff"), ("config.json", "[" * 100_000)],
)
def test_a_folder_whose_files_say_nothing_is_refused(config, name, content):
    folder = fit(config()).workdir
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"holds no readable run .*choose another --workdir"):
        fit(config())


@pytest.mark.parametrize("name", [".pid", "metrics.jsonl"])
def test_a_pipe_in_a_run_s_folder_is_replaced_and_not_waited_for(config, name):
    first = fit(config())
    (first.workdir / "result.json").unlink()
    (first.workdir / name).unlink()
    os.mkfifo(first.workdir / name)
    assert fit(config()).record["params_sha256"] == first.record["params_sha256"]
    assert (first.workdir / name).is_file()


def test_a_folder_in_use_is_told_whatever_says_by_whom(config):
    run = runs.Run(config().workdir, config())
    pid = run.folder / ".pid"
    pid.write_text("9" * 19)
    with pytest.raises(UsageError, match="is in use by process unknown"):
        fit(config())
    pid.unlink()
    os.mkfifo(pid)
    with pytest.raises(UsageError, match="is in use by process unknown"):
        fit(config())
    run.close()


def test_what_cannot_be_cleaned_up_is_told(config):
    folder = fit(config()).workdir
    (folder / "result.json").unlink()
    (folder / "checkpoints" / ".epoch.tmp").mkdir()
    with pytest.raises(DeviceError, match=r"\(Is a directory\); choose another --workdir"):
        fit(config())


@pytest.mark.parametrize("more", [(), (".lock",)])
def test_a_folder_with_other_files_is_left_alone(config, tmp_path, more):
    (tmp_path / "run").mkdir()
    for name in ("important", *more):
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        fit(config())


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match=r"\(Not a directory\); choose another --workdir"):
        fit(config(workdir=tmp_path / "file" / "run"))


def test_runs_of_the_same_second_get_folders_of_their_own(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {fit(config(workdir=None, epochs=1)).workdir for _ in range(3)}
    assert len(folders) == 3


def test_max_steps_ends_inside_an_epoch_with_its_metrics(config):
    result = fit(config(max_steps=20))
    rows = [
        json.loads(line) for line in (result.workdir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 15), (2, 20)]
    assert (result.record["epochs"], result.record["steps"]) == (2, 20)


def test_max_steps_on_an_epochs_end_adds_no_empty_epoch(config):
    assert fit(config(max_steps=15)).record["epochs"] == 1


def test_a_finished_run_is_not_run_again(config):
    first = fit(config())
    again = fit(config(steps_per_call=1))  # how it runs may differ
    assert again.params is None
    assert again.record == first.record


def test_another_run_in_the_same_folder_is_refused_with_the_differences(config):
    fit(config())
    with pytest.raises(UsageError, match=r"epochs \(was 3, now 4\)"):
        fit(config(epochs=4))


def test_a_folder_with_other_things_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        fit(config())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_workdir_that_cannot_be_a_folder_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot write the run's folder"):
        fit(config(workdir=tmp_path / "file" / "run"))


def test_a_loss_that_is_not_finite_names_its_step(config):
    with pytest.raises(NonFiniteError, match=r"at step 2 .*learning_rate 1e\+38"):
        fit(config(model="mlp", learning_rate=1e38))


def steps_kept(config) -> list[int]:
    names = (path.stem for path in (config().workdir / "checkpoints").glob("*.safetensors"))
    return sorted(int(name.rpartition("-")[2]) for name in names)


def test_a_gradient_that_is_not_finite_is_one_too(config, monkeypatch):
    """A square root's at 0 is infinite, where the loss is finite."""

    class Rooted(LogisticRegression):
        @nn.compact
        def __call__(self, x, *, train=False):
            return jnp.sqrt(self.param("logits", nn.initializers.zeros, (10,))) + 0 * x[:, 0, 0]

    monkeypatch.setitem(MODELS, "logistic", Rooted)
    with pytest.raises(NonFiniteError, match="at step 1 "):
        fit(config())
    assert steps_kept(config) == [0]


def test_the_last_finite_checkpoint_is_kept(config):
    """And the same command fails again, at the same step."""
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="at step 2 "):
            fit(config(model="mlp", learning_rate=1e38, steps_per_call=1, checkpoint_every=0))
        assert steps_kept(config) == [0, 1]


@pytest.mark.parametrize("how", [{"steps_per_call": 1}, {"steps_per_call": 5}, {"microbatches": 4}])
def test_debug_shows_the_operation_that_made_a_nan(config, how):
    with pytest.raises(NonFiniteError, match="at step 2 ") as caught:
        fit(config(model="mlp", learning_rate=1e38, debug=True, **how))
    assert isinstance(caught.value.__cause__, FloatingPointError)


def test_debug_changes_no_bit(config, tmp_path):
    plain = fit(config(model="mlp")).record["params_sha256"]
    debug = fit(config(model="mlp", debug=True, workdir=tmp_path / "debug")).record
    assert debug["params_sha256"] == plain


@pytest.mark.parametrize(
    "setting",
    [
        jax.enable_x64(True),
        jax.threefry_partitionable(False),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        jax.disable_jit(True),
    ],
    ids=("x64", "threefry", "dtype promotion", "rank promotion", "transfer guard", "no jit"),
)
def test_what_else_jax_was_told_changes_no_number(config, tmp_path, setting):
    plain = fit(config(model="mlp", dropout=0.2, max_steps=5, workdir=tmp_path / "plain"))
    with setting:
        told = fit(config(model="mlp", dropout=0.2, max_steps=5))
    assert told.record["params_sha256"] == plain.record["params_sha256"]


def test_offset_seeds_are_refused(config, monkeypatch):
    jax.config.update("jax_random_seed_offset", 7)
    try:
        with pytest.raises(UsageError, match="JAX_RANDOM_SEED_OFFSET is 7"):
            fit(config())
    finally:
        jax.config.update("jax_random_seed_offset", 0)


def test_more_steps_than_can_be_counted_are_refused(config):
    with pytest.raises(UsageError, match="15,000,000,000 steps in all"):
        fit(config(epochs=1_000_000_000, max_steps=1, schedule="onecycle"))


def test_deterministic_names_an_option_that_xla_knows(config):
    """Used on a GPU alone; a wrong name would be refused here too."""
    options = devices.DETERMINISTIC_OPTIONS
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    assert devices.compiler_options(jax.devices()[0], deterministic=True) is None
    gpu = SimpleNamespace(platform="gpu")
    assert devices.compiler_options(gpu, deterministic=True) == options
    assert devices.compiler_options(gpu, deterministic=False) is None


@pytest.mark.parametrize("damage", ["flipped", "no manifest", "a folder", "a loop", "not JSON"])
def test_a_damaged_result_is_an_error_and_can_be_made_again(config, damage):
    first = fit(config())
    path = first.workdir / "result.json"
    if damage == "no manifest":
        (first.workdir / "manifest.sha256").unlink()
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "a loop":
        path.unlink()
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"{" if damage == "not JSON" else path.read_bytes().replace(b"1", b"2"))
    with pytest.raises(CheckpointError, match=r"the result is damaged: .*; remove .*writes it"):
        fit(config())
    path.rmdir() if damage == "a folder" else path.unlink()
    again = fit(config())
    assert again.record["params_sha256"] == first.record["params_sha256"]


def test_a_batch_larger_than_the_split_is_refused(config):
    with pytest.raises(UsageError, match="allowed is 1 to 1437"):
        fit(config(batch_size=1438))


def test_a_batch_as_large_as_the_split_trains(config):
    assert fit(config(batch_size=1437, epochs=2)).record["steps"] == 2


def test_an_absent_platform_is_an_error_and_never_the_cpu(config):
    with pytest.raises(DeviceError, match="no tpu device; JAX finds cpu"):
        fit(config(platform="tpu"))


def test_bfloat16_trains_on_a_cpu_and_keeps_float32_parameters(config):
    result = fit(config(model="mlp", precision="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype("float32")}
    assert result.record["test_accuracy"] > 0.3


def test_normalize_changes_the_input(config, tmp_path):
    raw = fit(config(normalize=False, workdir=tmp_path / "raw")).record
    assert raw["params_sha256"] != fit(config()).record["params_sha256"]


def test_observers_hear_of_every_step_and_epoch_in_order(config):
    heard = []

    class Recorder(Callback):
        def on_train_begin(self, config, dataset, model, devices, workdir):
            heard.append(("start", dataset.name))

        def on_chunk_end(self, epoch, step, last_step, sums, train_s):
            assert (train_s > 0) == (step > 0)
            heard.append(("call", epoch, step, last_step, int(sums.count)))

        def on_epoch_end(self, row):
            heard.append(("epoch", row["epoch"]))

        def on_train_end(self, result):
            heard.append(("end", result.record["steps"]))

    fit(config(epochs=1, steps_per_call=8), observer=Recorder())
    assert heard == [
        ("start", "digits"),
        ("call", 1, 0, 15, 0),
        ("call", 1, 8, 15, 800),
        ("call", 1, 15, 15, 1437),
        ("epoch", 1),
        ("end", 15),
    ]


def test_params_sha256_depends_on_names_shapes_dtypes_and_values():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    variants = [
        base,
        {"b": base["b"], "c": base["a"]},
        {**base, "a": np.zeros((3, 2), np.float32)},
        {**base, "a": np.zeros((2, 3), np.int32)},
        {**base, "b": np.array([1, 1, 1, 2], np.float32)},
    ]
    assert len({runs.params_sha256(v) for v in variants}) == len(variants)
    assert runs.params_sha256({"b": base["b"], "a": base["a"]}) == runs.params_sha256(base)


def shown_by_tensorboard(folder) -> dict[tuple[str, int], float | None]:
    """By name and step: a scalar's value, None for an image."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("tensorboard/events.*"):
        data = path.read_bytes()
        while data:  # length, its checksum, so many bytes, their checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                scalar = value.WhichOneof("value") == "simple_value"
                found[value.tag, event.step] = value.simple_value if scalar else None
            data = data[16 + length :]
    return found


def test_tensorboard_gets_each_epoch_and_its_absence_is_explained(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    result = fit(config(tensorboard=True))
    found = shown_by_tensorboard(result.workdir)
    for row in map(json.loads, (result.workdir / "metrics.jsonl").read_text().splitlines()):
        for name, value in row.items():
            assert found[name, row["step"]] == pytest.approx(value, rel=1e-6)
    images = {place for place, value in found.items() if value is None}
    assert images == {("train", 0), ("confusion", 45)}
    assert fit(config(tensorboard=True)).record == result.record
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[tensorboard\]'"):
        fit(config(tensorboard=True, workdir=tmp_path / "another"))
    assert not (tmp_path / "another").exists()


def test_tensorboard_gets_the_mean_of_the_members_that_are_not_lost(config):
    pytest.importorskip("tensorboardX")
    made = config(tensorboard=True, seeds=3)
    row = {
        "epoch": 1,
        "step": 15,
        "train/loss": [1.0, None, 2.0],
        "train/accuracy": [0.8, 0.1, 0.6],
    }
    with contextlib.closing(runs.Run(made.workdir, made)) as run:
        run.append_metrics(row)
        run.append_metrics({**row, "step": 30, "train/loss": [None] * 3})
    found = shown_by_tensorboard(made.workdir)
    assert (found["train/loss", 15], found["train/accuracy", 15]) == (1.5, pytest.approx(0.7))
    assert {name for name, step in found if step == 30} == {"epoch", "step"}
