"""`verify`: an unchanged run passes, and what was changed is named."""

import json

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: replace(f / "metrics.jsonl", b"0.", b"1."), "metrics.jsonl differs"),
        (lambda f: replace(f / "config.json", b'"seed": 5', b'"seed": 6'), "config.json differs"),
        (lambda f: (f / "environment.json").unlink(), "environment.json"),
        (lambda f: (f / "manifest.sha256").unlink(), "no readable digest in manifest.sha256"),
        (lambda f: replace(f / "result.json", b"test_correct", b"tent_correct"), "result.json"),
        (lambda f: max(f.glob("checkpoints/*.safetensors")).write_bytes(b""), "42.safetensors"),
        (lambda f: min(f.glob("checkpoints/*.safetensors")).write_bytes(b""), "SHA-256 in epoch"),
        (lambda f: max(f.glob("checkpoints/*.safetensors")).unlink(), "of step 42 is gone"),
    ],
)
def test_what_was_changed_is_named(copied, command, change, named):
    change(folder := copied("one"))
    status, _, err = command("verify", folder)
    assert (status, err.count("\n")) == (4, 1)
    assert "differs from what its run wrote: " in err and named in err


def test_more_than_rounding_is_a_difference(copied, command, monkeypatch):
    """One image of 360 is more than the tolerance of 0.1 %."""
    path = (folder := copied("one")) / "result.json"
    correct = (record := json.loads(path.read_text()))["test_correct"]
    path.write_text(json.dumps({**record, "test_correct": correct - 1}))
    with (folder / "manifest.sha256").open("ab") as file:
        file.write(atomic_io.digest_lines({path.name: path.read_bytes()}))
    status, _, err = command("verify", folder)
    assert status == 4
    assert f"wrote: {correct} of 360 test images, recorded: {correct - 1}" in err
    monkeypatch.setattr("mnist_jax.inference.verify.TOLERANCE", 1 / 360)
    status, out, _ = command("verify", folder)
    used = json.loads((folder / "environment.json").read_text())["instruction_set"]
    assert (status, f"on cpu ({used}), which may round differently" in out) == (0, True)


def test_runs_that_are_not_complete(copied, command):
    folder = copied("one")
    (folder / "result.json").unlink()
    status, out, _ = command("verify", folder)
    assert (status, "the newest is at step 42" in out) == (0, True)
