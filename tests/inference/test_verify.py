"""`verify`: an unchanged run passes, and what was changed is named."""

import json

import numpy as np
import pytest
from filelock import FileLock

from mnist_jax import atomic_io


@pytest.mark.parametrize("name", ["one", "many"])
def test_an_unchanged_run_passes_and_stays_unchanged(name, copied, command):
    folder = copied(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, out, _ = command("verify", folder)
    assert (status, (lines := out.splitlines())[-1]) == (0, "OK")
    correct = np.atleast_1d(json.loads((folder / "result.json").read_text())["test_correct"])
    assert f"{', '.join(map(str, correct))} of 360 test images, as recorded" in lines[-2]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def replace(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def forge(folder, **fields) -> None:
    """Changes result.json and its digest."""
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    contents = {name: (folder / name).read_bytes() for name in names}
    (folder / "manifest.sha256").write_bytes(atomic_io.digest_lines(contents))


def checkpoints(folder) -> list:
    return sorted((folder / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: replace(f / "metrics.jsonl", b"0.", b"1."), "files"),
        (lambda f: replace(f / "config.json", b'"seed": 5', b'"seed": 6'), "files"),
        (lambda f: (f / "environment.json").unlink(), "files"),
        (lambda f: (f / "manifest.sha256").unlink(), "files"),
        (lambda f: replace(f / "result.json", b"test_correct", b"tent_correct"), "files"),
        (lambda f: checkpoints(f)[-1].write_bytes(b""), "checkpoints"),
        (lambda f: checkpoints(f)[0].write_bytes(b""), "checkpoints"),
        (lambda f: forge(f, test_correct=360), "accuracy"),
    ],
)
def test_what_was_changed_is_named(copied, command, change, named):
    change(folder := copied("one"))
    status, _, err = command("verify", folder)
    assert (status, err.count("\n")) == (4, 1)
    assert f"differs from what its run wrote: {named}: " in err


def test_more_than_rounding_is_a_difference(copied, command):
    """One image of 360 is more than the tolerance of 0.1 %."""
    folder = copied("one")
    correct = json.loads((folder / "result.json").read_text())["test_correct"]
    forge(folder, test_correct=correct - 1)
    status, _, err = command("verify", folder)
    assert status == 4
    assert f"{correct} of 360 test images, recorded: {correct - 1}" in err


def test_runs_that_are_not_complete(copied, command):
    folder = copied("one")
    with FileLock(folder / ".lock"):
        status, _, err = command("verify", folder)
    assert (status, "is in use" in err) == (2, True)
    (folder / "result.json").unlink()
    status, out, _ = command("verify", folder)
    assert (status, "the newest is at step 45" in out) == (0, True)
