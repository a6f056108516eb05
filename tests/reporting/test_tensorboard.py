"""--tensorboard: what its files hold."""

import sys
import time
from pathlib import Path

import pytest
from shared import rows_of

from mnist_jax import Config, fit, reporting
from mnist_jax.errors import UsageError
from mnist_jax.reporting.tensorboard import TensorBoard

pytest.importorskip("tensorboardX")


def events(folder: Path) -> list:
    """(name, step, number) in order; ("", step, None) for a start."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, so many bytes, their checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            if event.session_log.status == SessionLog.START:
                found.append(("", event.step, None))
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
            data = data[16 + length :]
    return found


def write(folder: Path, config: Config, step: int, *rows: dict) -> None:
    writer = TensorBoard()
    writer.on_train_begin(config, None, None, None, folder, step)
    for row in rows:
        writer.on_epoch_end(row)
    until, last = time.monotonic() + 30, rows[-1]["step"]
    while ("step", last, last) not in events(folder):  # so a killed process has its rows
        assert time.monotonic() < until
    writer.close()


def test_a_run_writes_its_metrics(config):
    config = config(tensorboard=True, log_steps=True)
    folder = fit(config, callbacks=reporting.make_callbacks(config)).workdir
    (start, *found), rows = events(folder), rows_of(folder)
    assert start == ("", 1, None)  # drops what a run wrote that ended before its first checkpoint
    scalars = {(name, step): value for name, step, value in found}
    expected = {(name, row["step"]): value for row in rows for name, value in row.items()}
    assert {key: scalars.pop(key) for key in expected} == pytest.approx(expected, rel=1e-6)
    names = ("step/loss", "step/grad_norm")
    assert set(scalars) == {(name, step) for name in names for step in range(1, 31)}
    fit(config, callbacks=reporting.make_callbacks(config))  # is complete: writes nothing
    assert events(folder) == [start, *found]


def test_a_resumed_run_appends_and_drops_what_came_after_its_checkpoint(tmp_path):
    (folder := tmp_path / "tensorboard").mkdir()
    (folder / "events.of_the_first_process").touch()
    write(tmp_path, Config(), 30, {"step": 45, "train/loss": 1.0})
    assert len(list(folder.iterdir())) == 2
    assert events(tmp_path) == [("", 31, None), ("step", 45, 45.0), ("train/loss", 45, 1.0)]


def test_seeds_are_written_as_the_mean_of_the_finite_and_grid_points_apart(tmp_path):
    row = {"step": 15, "train/loss": [1.0, None, 2.0], "train/accuracy": [0.75, 0.1, 0.25]}
    write(tmp_path, Config(seeds=3), 1, row, {**row, "step": 30, "train/loss": [None] * 3})
    grid = Config(learning_rate=(0.1, 0.2))
    write(tmp_path / "grid", grid, 1, {"step": 45, "train/loss": [1.0, 2.0]})
    found = {(name, step): value for name, step, value in events(tmp_path)}
    assert (found["train/loss", 15], found["train/accuracy", 15]) == (1.5, 0.5)
    assert ("train/loss", 30) not in found
    apart = [event for event in events(tmp_path / "grid") if event[0].startswith("train")]
    assert apart == [(f"train/loss/learning_rate_{x}", 45, 10 * x) for x in (0.1, 0.2)]


def test_a_missing_tensorboardx_is_refused_before_a_folder_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    monkeypatch.delitem(sys.modules, "mnist_jax.reporting.tensorboard")
    with pytest.raises(UsageError, match="pip install tensorboardX"):
        reporting.make_callbacks(Config(tensorboard=True))
