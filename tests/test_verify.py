"""`python -m mnist_jax verify`: what a run left is proven, and what was changed is named."""

import json
import re

import pytest
from filelock import FileLock

from mnist_jax import Config, __main__, fit
from mnist_jax import atomic_io as storage
from mnist_jax.commands import COMMANDS
from mnist_jax.errors import CheckpointError, InterruptedRunError
from mnist_jax.runs import run_dir as runs
from mnist_jax.signals import Stop
from mnist_jax.training import Callback


@pytest.fixture
def folder(data_dir, tmp_path):
    where = {"data_dir": data_dir, "workdir": tmp_path / "run"}
    return fit(Config(model="logistic", dataset="digits", epochs=4, **where)).workdir


def verify(folder, data_dir) -> int:
    return __main__.main(["verify", str(folder), f"--data_dir={data_dir}"])


def test_a_run_that_nobody_touched_is_ok_and_unchanged(folder, data_dir, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert verify(folder, data_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "OK"
    record = json.loads((folder / "result.json").read_text())
    assert f"{record['test_correct']} of 360 test images, as recorded" in lines[-2]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def forged(path, change) -> None:
    """As by somebody who sets the digests right as well."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    contents = {name: (path.parent / name).read_bytes() for name in names}
    (path.parent / "manifest.sha256").write_bytes(storage.digest_lines(contents))


def test_a_run_of_a_version_with_fewer_flags_is_ok(folder, data_dir):
    forged(folder / "config.json", lambda config: config.pop("report"))
    forged(folder / "result.json", lambda record: record["config"].pop("report"))
    assert verify(folder, data_dir) == 0


def replace(path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def make_huge(path) -> None:
    """Takes no place on the disk, but in memory."""
    with path.open("wb") as file:
        file.truncate(10**12)


def make_loop(path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def newest(folder):
    return max((folder / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: replace(f / "metrics.jsonl", b"0.", b"1."), "files, metrics"),
        (lambda f: replace(f / "environment.json", b"cores", b"bores"), "files"),
        (lambda f: replace(f / "config.json", b'"seed": 1234', b'"seed": 1235'), "files, result"),
        (
            lambda f: replace(f / "config.json", b'"seeds": null', b'"seeds": 90000'),
            "files, checkpoints",
        ),
        (lambda f: (f / "environment.json").unlink(), "files"),
        (lambda f: (f / "manifest.sha256").unlink(), "files"),
        (lambda f: replace(f / "result.json", b"test_correct", b"tent_correct"), "files"),
        (lambda f: newest(f).write_bytes(b""), "checkpoints"),
        (lambda f: min((f / "checkpoints").glob("*.safetensors")).write_bytes(b""), "checkpoints"),
        (lambda f: make_huge(newest(f).with_name("more.safetensors")), "checkpoints"),
        (lambda f: make_loop(f / "result.json"), "files"),
        (
            lambda f: forged(f / "result.json", lambda r: r.update(test_correct=360)),
            "result, accuracy",
        ),
        (
            lambda f: forged(f / "result.json", lambda r: r.update(test_correct="all")),
            "result, accuracy",
        ),
        (
            lambda f: forged(f / "result.json", lambda r: r.pop("test_count")),
            "result, accuracy",
        ),
        (
            lambda f: forged(
                f / "result.json", lambda r: [r.pop(n) for n in ("environment", "test_correct")]
            ),
            "result, accuracy",
        ),
        (lambda f: forged(f / "result.json", lambda r: r.update(params_sha256="0")), "result"),
    ],
)
def test_what_was_changed_is_named(folder, data_dir, capsys, change, named):
    change(folder)
    assert verify(folder, data_dir) == 4
    shown = capsys.readouterr()
    assert f"is not as its run left it: {named}; what" in shown.err
    assert shown.err.count("\n") == 1
    assert "WRONG" in shown.out


def test_an_accuracy_that_does_not_come_out_again_is_wrong(folder, data_dir, capsys, monkeypatch):
    """As from a model evaluated on other images."""
    monkeypatch.setattr(
        "mnist_jax.inference.restore.EVAL_BATCH_SIZE", 7
    )  # the same images all the same
    assert verify(folder, data_dir) == 0
    monkeypatch.setattr("mnist_jax.steps.to_input", lambda image, normalize: image * 0.0)
    assert verify(folder, data_dir) == 4
    assert "is not as its run left it: accuracy" in capsys.readouterr().err


def test_a_run_that_is_not_complete_is_checked_as_far_as_it_came(data_dir, tmp_path, capsys):
    stop = Stop()

    class StopAfterAnEpoch(Callback):
        def on_epoch_end(self, row):
            stop.signal = 15

    where = {"data_dir": data_dir, "workdir": tmp_path / "run", "dataset": "digits"}
    config = Config(model="logistic", epochs=3, steps_per_call=5, **where)
    with pytest.raises(InterruptedRunError):
        fit(config, observer=StopAfterAnEpoch(), stop=stop)
    assert verify(tmp_path / "run", data_dir) == 0
    assert "the run stands at step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["verify", "nowhere"], 2, "nowhere holds no run"),
        (["verify"], 2, "^error: RUN is missing: The run's folder; see --help$"),
        (["compare"], 2, "^error: RUN RUN is missing: The two runs' folders; see --help$"),
        (["draw"], 2, "^error: --workdir is missing: The run's folder; see --help$"),
        (
            ["evaluate", "/"],
            2,
            "^error: '/' belongs to no flag; a flag is written --workdir=/; see",
        ),
        (["evaluate", "no"], 2, "'no' belongs to no flag; a flag is written --name=value"),
        (["evaluate", "x" * 5000], 2, "belongs to no flag; a flag is written --name=value"),
        (["verify", "no\nwhere"], 2, r"no\\nwhere holds no run"),
        (["verify", "a\0b"], 4, r"a\\x00b/config.json is not the config of a run"),
        (["verify", "--folder=x"], 2, "unknown flag '--folder'"),
        (["verify", "---x"], 2, "^error: folder is missing; see --help$"),
        (["verify", ".", "--dat_dir=x"], 2, "did you mean --data_dir"),
        (["verify", ".", "--platform=gup"], 2, "did you mean gpu"),
        (["verfiy", "x"], 2, "did you mean verify"),
        (["data", "--dataset=mnits"], 2, "did you mean mnist"),
        (["data", "--dataset=digits", "--data_dir=a\0b"], 2, r"'a\\x00b', which is no path"),
        (["verify", ".", "--data_dir=a\0b"], 2, r"'a\\x00b', which is no path"),
        (["data", "--manual_dir=nowhere"], 3, "--manual_dir=nowhere is not a folder"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, status, message, capsys):
    assert __main__.main(words) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_the_commands_explain_themselves(capsys, data_dir):
    assert __main__.main([]) == 0
    overview = capsys.readouterr().out
    assert __main__.main(["help"]) == 0
    assert capsys.readouterr().out == overview
    for name in COMMANDS:
        assert name in overview
        with pytest.raises(SystemExit) as stop:
            __main__.main([name, "--help"])
        assert not stop.value.code
    assert __main__.main(["data", "--dataset=digits", f"--data_dir={data_dir}"]) == 0
    assert "digits: 1,437 train and 360 test images" in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_judged(folder, data_dir, capsys):
    with FileLock(folder / ".lock"):
        assert verify(folder, data_dir) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_a_result_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(storage, "read_bounded", forbidden)
    with pytest.raises(CheckpointError, match=r"cannot read the result .*Permission denied"):
        runs.read_result(tmp_path)
