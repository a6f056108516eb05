"""A run's folder: one process holds it, damage gets one clear line, nothing private is recorded."""

import dataclasses
import json
import subprocess
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from mnist_jax import Config, __main__, fit, load_dataset, load_run, predict, save_run
from mnist_jax.data import DataSpec
from mnist_jax.errors import CheckpointError, UsageError
from mnist_jax.models import LogisticRegression, init_variables
from mnist_jax.runs import environment
from mnist_jax.runs.run_dir import RunDir, read_result

DATA = DataSpec("digits", (28, 28, 1), tuple("0123456789"))


@pytest.fixture
def config(config) -> Config:
    return config(epochs=1, batch_size=400).resolve()


@pytest.fixture
def folder(config) -> Path:
    return fit(config).workdir


def test_a_folder_in_use_or_of_other_things_is_refused_and_half_written_files_removed(config):
    (folder := config.workdir).mkdir()
    (notes := folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run; choose another"):
        RunDir(folder, config, DATA)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    notes.unlink()
    in_use = pytest.raises(UsageError, match="is in use by another process")
    with closing(RunDir(folder, config, DATA)), in_use:
        RunDir(folder, config, DATA)
    (folder / "checkpoints").mkdir()
    for name in (".metrics.jsonl.abc.tmp", "checkpoints/.epoch-0000.abc.tmp"):
        (folder / name).write_text("half")
    RunDir(folder, config, DATA).close()
    assert not list(folder.rglob("*.tmp"))


def test_a_loop_of_ones_own_saves_a_run(config, tmp_path):
    data, model = load_dataset("digits", data_dir=config.data_dir), LogisticRegression()
    params = jax.device_get(init_variables(model, jax.random.key(0))[0])
    params = jax.tree.map(np.asfortranarray, params)  # as a transposed weight of another library
    other = dataclasses.replace(config, ema_decay=0.9, seeds=2, learning_rate=(0.1, 0.2))
    save_run(tmp_path / "mine", other, data.spec, params, step=np.int32(7))
    run = load_run(tmp_path / "mine")
    assert (run.step, run.data, run.warnings) == (7, data.spec, [])
    jax.tree.map(np.testing.assert_array_equal, run.members[0], (params, {}))
    logits = model.apply({"params": params}, data.test.image[:9] / 255)
    found = predict(tmp_path / "mine", data.test.image[:9])
    np.testing.assert_allclose(found, jax.nn.softmax(logits), rtol=1e-4)
    with pytest.raises(UsageError, match="mine holds a run; choose another folder"):
        save_run(tmp_path / "mine", config, data.spec, params)
    for wrong in ({}, params | {"logits2": params["logits"]}):  # none is missing, none left over
        with pytest.raises(CheckpointError, match=r"no array .*params/logits2?/bias"):
            save_run(tmp_path / "other", config, data.spec, wrong)
    assert not (tmp_path / "other").exists()


def test_sha256sum_checks_the_manifest_and_a_damaged_result_is_written_again(config, folder):
    command = ["sha256sum", "--check", "--strict", "manifest.sha256"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    assert done.stdout.splitlines() == [f"{name}: OK" for name in files]
    before = read_result(folder)
    path = folder / "result.json"
    path.write_bytes(path.read_bytes().replace(b"test_accuracy", b"best_accuracy"))
    with pytest.raises(CheckpointError, match=r"cannot be used .*remove it and repeat"):
        fit(config)
    path.unlink()
    again = fit(config)  # from the last checkpoint
    assert again.record["params_sha256"] == before["params_sha256"]
    assert again.record["test_correct"] == before["test_correct"]


def test_a_damaged_or_other_config_is_an_error_and_an_unknown_key_is_read(config, folder, capsys):
    values = json.loads((folder / "config.json").read_text())
    uses = (lambda: fit(config), lambda: load_run(folder))
    for version in ({}, {"version": 2}, {"version": 4}):  # the first had none
        other = {k: v for k, v in values.items() if k != "version"} | version
        (folder / "config.json").write_text(json.dumps(other))
        number = version.get("version", 1)
        message = f"{folder} has format version {number} and this program reads 3; .*train again"
        for use in uses:
            with pytest.raises(UsageError, match=message):
                use()
        for command in ("evaluate", "report", "verify", "predict"):
            assert __main__.main([command, str(folder), *["x.png"] * (command == "predict")]) == 2
            line = capsys.readouterr().err
            assert line.startswith(f"error: {folder} has format version") and line.count("\n") == 1
    wrong = ({"modle": "cnn"}, {"seed": []}, {"data": []})
    damaged = [json.dumps({"version": 3, **fields}).encode() for fields in wrong]
    for content in (b"", b"{", b"[]", b"\xff\xfe", *damaged):
        (folder / "config.json").write_bytes(content)
        for use in uses:
            with pytest.raises((CheckpointError, UsageError)):
                use()
        assert (folder / "config.json").read_bytes() == content
    (folder / "config.json").write_text(json.dumps({**values, "colour": "blue"}))  # newer
    assert load_run(folder).config == config
    assert fit(config).record == read_result(folder)


def test_what_changes_numbers_is_recorded_without_paths_and_addresses(monkeypatch):
    device = jax.devices()[0]  # XLA reads its flags now, and would refuse these
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_foo=1 --xla_dump_to=/home/somebody/dump")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = environment.describe(device)
    assert found["variables"]["XLA_FLAGS"] == "--xla_cpu_foo=1"
    text = json.dumps(found)
    assert not [word for word in ("somebody", "10.0.0.1", "secret") if word in text]
    assert found["jax"] == jax.__version__
    assert (found["platform"], found["processes"]) == ("cpu", 1)
    assert {"python", "cpu", "cores", "instruction_set", "git_dirty"} <= found.keys()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a container
    assert environment.describe(device)["git_commit"] == found["git_commit"]
