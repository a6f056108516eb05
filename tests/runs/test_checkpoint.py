"""CheckpointManager: a checkpoint is complete or absent, and damage is detected."""

import dataclasses
import threading
from contextlib import closing

import numpy as np
import pytest
import safetensors.numpy

from mnist_jax import atomic_io
from mnist_jax.errors import CheckpointError
from mnist_jax.metrics import Metrics
from mnist_jax.runs.checkpoint import CheckpointManager, Progress, flatten, load_saved, unflatten
from mnist_jax.steps import TrainState


def make_progress(step: int, *, epoch: int = 0) -> Progress:
    """After `step` updates, the last two of them in the current epoch."""
    rng = np.random.default_rng(step)
    params = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(0, np.float32)}
    moments = (rng.integers(0, 9, 5), np.array(True))
    model_state = {"batch_stats": {"mean": rng.normal(size=3).astype(np.float32)}}
    state = TrainState(np.array(step, np.int32), params, model_state, moments, None)
    rows = [{"epoch": 1, "step": step - 2, "train/loss": 0.123456789}]
    return Progress(state, Metrics.zeros(), epoch, 2, 0.5, rows, {"test_accuracy": 0.5})


@pytest.fixture
def manager(tmp_path):
    with closing(CheckpointManager(tmp_path / "checkpoints", every_s=60)) as made:
        yield made


def save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(make_progress(step))
    manager.wait_until_finished()


def path_of(manager: CheckpointManager, step: int):
    return manager.folder / f"epoch-0000-step-{step:08d}.safetensors"


def assert_is(found, expected: Progress) -> None:
    arrays, metadata, _ = found
    tree = {"state": expected.state, "metrics": expected.metrics}
    np.testing.assert_equal(arrays, flatten(tree))
    filled = unflatten(tree, arrays)  # refuses another dtype
    assert Progress(**filled, **metadata) == dataclasses.replace(expected, **filled)


def test_a_checkpoint_makes_the_round_trip_and_the_newest_three_are_kept(manager):
    with pytest.raises(CheckpointError, match="holds no checkpoint; if it never had one, repeat"):
        load_saved(manager.folder.parent)
    save(manager, 2, 99_999_999, 3, 100_000_000)
    assert_is(load_saved(manager.folder.parent), make_progress(100_000_000))
    kept = [path_of(manager, step) for step in (3, 99_999_999, 100_000_000)]
    assert {*manager.folder.iterdir()} == {*kept, *map(atomic_io.digest_path, kept)}
    manager.save(make_progress(3, epoch=1))  # newer, as the end of an epoch is than its last step
    manager.wait_until_finished()
    assert_is(load_saved(manager.folder.parent), make_progress(3, epoch=1))
    with pytest.raises(CheckpointError, match=r"p/a is float32\[2\], expected float64\[2\]"):
        unflatten({"p": {"a": np.zeros(2, "f8")}}, {"p/a": np.zeros(2, "f4")})


def test_a_save_copies_the_arrays_at_once(manager, monkeypatch):
    changed, encode = threading.Event(), safetensors.numpy.save
    monkeypatch.setattr(safetensors.numpy, "save", lambda *x: changed.wait(10) and encode(*x))
    progress = make_progress(7)
    manager.save(progress)
    assert manager.is_saving() and not manager.is_due()
    manager.every_s = 0  # then no save is skipped
    assert manager.is_due() and not manager.is_saving()
    progress.state.params["a"][:] = -1
    progress.rows.append({})
    changed.set()
    manager.wait_until_finished()
    assert_is(load_saved(manager.folder.parent), make_progress(7))


def test_a_damaged_checkpoint_is_named_and_replaced_and_the_one_before_it_used(manager):
    def damage(step: int) -> None:
        data = bytearray(path_of(manager, step).read_bytes())
        data[-3] ^= 1
        path_of(manager, step).write_bytes(data)

    save(manager, 2, 3, 4)
    damage(4)
    assert_is(load_saved(manager.folder.parent), make_progress(3))
    before = path_of(manager, 3).stat()
    save(manager, 3, 4)  # the resumed run comes to these steps again
    assert_is(load_saved(manager.folder.parent), make_progress(4))
    # A crash while an intact one is replaced would leave the new digest beside the old file.
    assert path_of(manager, 3).stat() == before
    for step in (2, 3, 4):
        damage(step)
    with pytest.raises(CheckpointError, match=r"00000002.* is damaged .*; restore one, or train"):
        load_saved(manager.folder.parent)
