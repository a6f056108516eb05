"""A run that is interrupted anywhere ends with the bits of one that is not."""

import itertools
import json
import re
import signal
import threading
from unittest import mock

import pytest
import safetensors.numpy
from shared import StopAfter, rows_of, rows_without_times

from mnist_jax import Callback, Config, fit
from mnist_jax.errors import CheckpointError, DeviceError, InterruptedRunError, UsageError
from mnist_jax.runs.checkpoint import CheckpointManager


@pytest.fixture
def config(config, tmp_path):
    """Makes a Config of a run of several calls an epoch."""
    run = {"model": "mlp", "hidden_sizes": (16,), "steps_per_call": 4, "workdir": tmp_path / "a b"}
    return lambda **fields: config(**{**run, **fields})


def train(config: Config, events: int = 0):
    """`fit`, interrupted at this event; the result or None, and the callback."""
    callback = StopAfter(events)
    callback.on_warning, callback.on_train_begin = mock.Mock(), mock.Mock()
    try:
        return fit(config, callbacks=[callback]), callback
    except InterruptedRunError as error:
        assert error.exit_status == 128 + signal.SIGUSR1
        assert str(error).endswith(f"--workdir='{config.workdir}'")
        return None, callback


SEEDS = {"model": "logistic", "hidden_sizes": None, "seeds": 2}


@pytest.mark.parametrize("fields", [{"dropout": 0.3, "ema_decay": 0.9}, SEEDS])
def test_a_run_interrupted_after_every_event_ends_with_the_same_bits(config, tmp_path, fields):
    whole = fit(config(workdir=tmp_path / "whole", **fields))
    result, resumed_at = None, []
    while result is None:
        result, callback = train(config(**fields), events=2)
        resumed_at.append(callback.on_train_begin.call_args.args[-1])
    assert len(set(resumed_at)) >= 4
    epochs_s = [row["train_s"] for row in rows_of(result.workdir)]  # over all the processes
    assert result.record["timings"]["train_s"] == pytest.approx(sum(epochs_s))
    assert result.record["params_sha256"] == whole.record["params_sha256"]
    assert result.record["test_correct"] == whole.record["test_correct"]
    assert rows_without_times(result.workdir) == rows_without_times(whole.workdir)


def interrupted(config: Config):
    """The folder of a run that stands within its second epoch."""
    assert train(config, events=6)[0] is None
    return config.workdir


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(config, tmp_path):
    """The partial line is what a process leaves that is killed while it ends an epoch."""
    whole = fit(config(workdir=tmp_path / "whole"))
    folder = interrupted(config(checkpoint_every=0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step": 3')
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    result, callback = train(config())
    [warning] = [call.args[0] for call in callback.on_warning.call_args_list]
    assert result.record["warnings"] == [warning]
    assert str(newest) in warning and re.search(r"; epoch-.*\.safetensors is used instead", warning)
    assert result.record["params_sha256"] == whole.record["params_sha256"]
    assert rows_without_times(folder) == rows_without_times(whole.workdir)


@pytest.mark.parametrize("loss", ["damaged", "removed"])
def test_a_run_without_its_checkpoints_never_starts_again_silently(config, loss):
    folder = interrupted(config())
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"") if loss == "damaged" else path.unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert before
    with pytest.raises(CheckpointError, match="restore"):
        fit(config())
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("events", "step", "epochs"), [(0, 30, 2), (1, 4, 0), (0, 0, 0)])
def test_a_checkpoint_that_cannot_be_written_is_an_error(config, monkeypatch, events, step, epochs):
    """The last one of a run, or of one that a signal ends; without the first one no metrics."""
    encode = safetensors.numpy.save

    def save(arrays, *metadata):
        if arrays.get("state/step") == step:
            raise OSError(28, "No space left on device")
        return encode(arrays, *metadata)

    monkeypatch.setattr(safetensors.numpy, "save", save)
    with pytest.raises(DeviceError, match="No space left on device"):
        train(config(), events)
    assert not (config().workdir / "result.json").exists()
    assert len(rows_of(config().workdir)) == epochs


def test_another_code_is_refused_and_can_be_allowed(config):
    folder = interrupted(config())

    def edit(name: str) -> None:
        values = json.loads((folder / "environment.json").read_text())
        values |= {"cpu": name, "devices_used": 2, "code_sha256": name}
        (folder / "environment.json").write_text(json.dumps(values))

    edit("one")
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    with pytest.raises(UsageError, match=r"code of mnist_jax has changed .*--allow_code_change"):
        fit(config())
    assert {path: path.read_bytes() for path in before} == before
    (path := folder / "environment.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"cannot use .*environment.json"):
        fit(config())
    path.write_bytes(before[path])
    assert train(config(allow_code_change=True), events=2)[0] is None
    edit("two")
    result, callback = train(config(allow_code_change=True))
    [warning] = [call.args[0] for call in callback.on_warning.call_args_list]
    facts = "environment: cpu (was two, now ", "devices_used (was 2, now 1)", "code_sha256 (was two"
    assert all(fact in warning for fact in facts) and result.record["warnings"] == [warning]
    environment = json.loads((folder / "environment.json").read_text())
    assert [then["code_sha256"] for then in environment["earlier"]] == ["one", "two"]
    assert environment["code_sha256"] == result.record["environment"]["code_sha256"]


def test_epochs_that_end_during_a_save_resume_without_checkpoints(config, tmp_path, monkeypatch):
    """As on an accelerator; checkpoint_every=0 saves every epoch."""
    whole = fit(config(epochs=5, workdir=tmp_path / "whole"))
    killed, calls, encode = threading.Event(), itertools.count(), safetensors.numpy.save

    def slow(*arguments):
        if next(calls) > 0:  # the first save is of the initial state
            killed.wait(60)
        return encode(*arguments)

    class KilledAfter(Callback):
        def on_epoch_end(self, row):
            if row["epoch"] == 3:
                killed.set()
                raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        fit(config(epochs=5), callbacks=[KilledAfter()])
    folder = config().workdir
    names = [path.stem for path in folder.glob("checkpoints/*.safetensors")]
    assert len(names) == 2 and max(names) < "epoch-0003"
    assert len(rows_without_times(folder)) == 3
    every = fit(config(epochs=5, checkpoint_every=0, workdir=tmp_path / "every"))
    assert len([*every.workdir.glob("checkpoints/epoch-000[45]-*.safetensors")]) >= 2
    monkeypatch.setattr(CheckpointManager, "is_saving", lambda self: True)  # also at the last step
    again = fit(config(epochs=5))
    assert max(folder.glob("checkpoints/*.safetensors")).name.startswith("epoch-0005")
    assert again.record["params_sha256"] == whole.record["params_sha256"]
    assert rows_without_times(folder) == rows_without_times(whole.workdir)
