"""CheckpointManager: whole or absent, proven, and never a silent fresh start."""

import json
import threading

import numpy as np
import pytest
import safetensors.numpy

from mnist_jax import atomic_io as storage
from mnist_jax.errors import CheckpointError
from mnist_jax.runs import checkpoint
from mnist_jax.runs.checkpoint import CheckpointManager


def make_tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "step": np.array(seed, np.int32),
        "params": {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.zeros(0, np.float32)},
        "pair": (rng.integers(0, 9, 5), np.array(True)),
    }


@pytest.fixture
def checkpoints(tmp_path):
    made = CheckpointManager(tmp_path / "run" / "checkpoints")
    made.folder.parent.mkdir()
    yield made
    made.close()


def save(checkpoints: CheckpointManager, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step // 2, step, make_tree(step), {"epoch": step})
    checkpoints.wait()


def path_of(checkpoints: CheckpointManager, step: int):
    return checkpoints.folder / f"epoch-{step // 2:04d}-step-{step:08d}.safetensors"


def assert_is(loaded, step: int) -> None:
    arrays, rest, _ = loaded
    got, want = checkpoint.names_of(arrays), checkpoint.names_of(make_tree(step))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert got[name].dtype == want[name].dtype
    assert rest == {"epoch": step}


def test_what_was_saved_comes_back_and_the_newest_three_are_kept(checkpoints):
    assert checkpoints.load(make_tree()) is None
    save(checkpoints, 1, 20, 3, 100_000_000)
    assert_is(checkpoints.load(make_tree()), 100_000_000)
    names = {path.name for path in checkpoints.folder.iterdir()}
    kept = [path_of(checkpoints, step) for step in (3, 20, 100_000_000)]
    assert names == {p.name for p in kept} | {storage.digest_path(p).name for p in kept}


def test_an_epoch_s_end_is_newer_than_its_last_step(checkpoints):
    checkpoints.save(1, 5, make_tree(5), {"epoch": 5})
    checkpoints.save(0, 5, make_tree(4), {"epoch": 4})
    checkpoints.wait()
    assert_is(checkpoints.load(make_tree()), 5)


def test_a_save_holds_what_the_arrays_were_when_it_was_called(checkpoints, monkeypatch):
    tree, rows, changed = make_tree(7), [1], threading.Event()
    encode = safetensors.numpy.save

    def late(*args):
        changed.wait(10)
        return encode(*args)

    monkeypatch.setattr(safetensors.numpy, "save", late)
    checkpoints.save(3, 7, tree, {"epoch": 7, "rows": rows})
    tree["params"]["a"][:] = -1
    rows.append(2)
    changed.set()
    checkpoints.wait()
    arrays, rest, _ = checkpoints.load(make_tree())
    np.testing.assert_array_equal(arrays["params"]["a"], make_tree(7)["params"]["a"])
    assert rest == {"epoch": 7, "rows": [1]}


def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "without digest":
        storage.digest_path(path).unlink()
    elif how == "larger":
        path.write_bytes(data + bytes(checkpoint.MAX_HEADER_BYTES))
    elif how == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        place = {"head": 3, "header": 30, "data": -3}[how]
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place:][1:])


@pytest.mark.parametrize(
    "how",
    ["head", "header", "data", "truncated", "empty", "larger", "without digest", "link", "folder"],
)
def test_a_damaged_one_is_named_and_the_one_before_it_used(checkpoints, how):
    save(checkpoints, 1, 2, 3)
    damage(path_of(checkpoints, 3), how)
    loaded = checkpoints.load(make_tree())
    assert_is(loaded, 2)
    (notice,) = loaded[2]
    assert str(path_of(checkpoints, 3)) in notice
    for step in (1, 2):
        damage(path_of(checkpoints, step), how)
    with pytest.raises(CheckpointError, match=r"step-00000001.*cannot be used.*start again"):
        checkpoints.load(make_tree())


def rewrite(path, change) -> None:
    """With a digest that is right, as another program would write it."""
    arrays = safetensors.numpy.load(path.read_bytes())
    metadata = {"format": checkpoint.VERSION, "rest": json.dumps({"epoch": 1})}
    change(arrays, metadata)
    storage.write_verified(path, safetensors.numpy.save(arrays, metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: m.update(format="2"), "format version '2'; this program reads 1"),
        (lambda a, m: m.clear(), "format version None"),
        (lambda a, m: m.update(rest="[]"), "not a JSON object"),
        (lambda a, m: m.update(rest="{"), "Expecting"),
        (
            lambda a, m: a.update({"params/a": np.zeros((4, 3), "f4")}),
            r"params/a is .*\[4, 3\]",
        ),
        (lambda a, m: a.update({"params/a": np.zeros((3, 4), "f8")}), "params/a is float64"),
        (lambda a, m: a.pop("step"), "step is missing"),
        (lambda a, m: a.update(more=np.zeros(1)), "more is unknown"),
    ],
)
def test_another_program_s_file_is_refused_with_the_reason(checkpoints, change, message):
    save(checkpoints, 1)
    rewrite(path_of(checkpoints, 1), change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(make_tree())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("pair/1", {"dtype": "F8_E4M3", "shape": [1]}, "no arrays that can be read .'F8_E4M3'"),
        ("params/b", {"dtype": "F32", "shape": [0, 2**40, 2**40]}, "no arrays that can be read"),
        ("step", {"dtype": "I32", "shape": [1] * 100}, "no arrays that can be read .*dimension"),
    ],
)
def test_arrays_that_numpy_does_not_have_are_refused(checkpoints, name, array, message):
    save(checkpoints, 1)
    data = path_of(checkpoints, 1).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[name].update(array)
    text = json.dumps(header).encode()
    spoiled = len(text).to_bytes(8, "little") + text + data[end:]
    storage.write_verified(path_of(checkpoints, 1), spoiled)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(make_tree())


def test_a_linked_folder_is_refused(checkpoints, tmp_path):
    save(checkpoints, 1)
    checkpoints.folder.rename(tmp_path / "elsewhere")
    checkpoints.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        checkpoints.load(make_tree())


def test_a_save_that_failed_is_an_error_and_leaves_what_was_there(checkpoints, monkeypatch):
    save(checkpoints, 1)

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_verified", full)
        checkpoints.save(1, 2, make_tree(2), {})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert_is(checkpoints.load(make_tree()), 1)
    save(checkpoints, 3)
    assert_is(checkpoints.load(make_tree()), 3)


def test_leftovers_of_a_killed_process_are_cleaned_up(checkpoints):
    save(checkpoints, 1)
    leftover = checkpoints.folder / ".step-00000002.safetensors.abc.tmp"
    leftover.write_bytes(b"half")
    assert_is(checkpoints.load(make_tree()), 1)
    assert leftover.exists()  # for all a reader knows, somebody is writing it
    checkpoints.clean_up()
    assert not leftover.exists()


def test_thousands_of_epochs_can_be_read_again(checkpoints):
    """Each adds a line to what stands beside the arrays."""
    rows = [{"epoch": i, "train/loss": [0.123456789] * 10} for i in range(5_000)]
    checkpoints.save(5_000, 5_000, make_tree(), {"rows": rows})
    checkpoints.wait()
    assert checkpoints.load(make_tree())[1] == {"rows": rows}
