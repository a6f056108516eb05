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
    (folder / "result.json").unlink()
    status, out, _ = command("verify", folder)
    assert (status, out.endswith("accuracy    not recorded yet\nOK\n")) == (0, True)


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


@pytest.mark.parametrize(("more", "status"), [(10, 0), (-10, 0), (11, 4), (-11, 4)])
def test_rounding_changes_a_tenth_of_a_percent_of_the_answers(copied, command, more, status):
    """Of 10,000 images, as the record says, in one of three networks."""
    path = (folder := copied("many")) / "result.json"
    *others, last = (record := json.loads(path.read_text()))["test_correct"]
    changed = {"test_count": 10_000, "test_correct": [*others, last + more]}
    path.write_text(json.dumps(record | changed))
    with (folder / "manifest.sha256").open("ab") as file:
        file.write(atomic_io.digest_lines({path.name: path.read_bytes()}))
    found, out, err = command("verify", folder)
    used = json.loads((folder / "environment.json").read_text())["instruction_set"]
    assert (found, f"on cpu ({used}), which may round differently" in out) == (status, not status)
    counts = f"{last} of 10000 test images, recorded: {', '.join(map(str, others))}, {last + more}"
    assert counts in (err if status else out)
