"""`train.py` and `python -m mnist_jax` as a user meets them: flags, messages, exit statuses."""

import contextlib
import dataclasses
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train
from mnist_jax import Config, cli
from mnist_jax.__main__ import COMMANDS
from mnist_jax.__main__ import main as other_commands
from mnist_jax.errors import WorseError

ROOT = Path(__file__).resolve().parents[1]


def parse(*argv: str) -> Config:
    return cli.parse(Config, argv, prog="train.py", description="")


def digits(data_dir: Path, workdir: Path, *more: str) -> list[str]:
    where = [f"--data_dir={data_dir}", f"--workdir={workdir}"]
    return ["--model=logistic", "--dataset=digits", "--epochs=2", *where, *more]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of Python in the checkout."""
    environment = {**os.environ, **variables}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_flags_reach_the_config_in_either_spelling():
    config = parse("--model=mlp", "--batch-size", "50", "--learning_rate=0.01", "--no-normalize")
    assert (config.model, config.batch_size, config.learning_rate) == ("mlp", 50, 0.01)
    assert config.normalize is False
    assert parse("--hidden_sizes", "64", "32", "--model=mlp").hidden_sizes == (64, 32)
    assert parse("--learning_rate", "0.1", "0.01").learning_rate == (0.1, 0.01)
    assert parse("--steps_per_call=7").steps_per_call == 7
    assert parse("--steps_per_call=auto").steps_per_call == "auto"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--modle=cnn"], "--modle"),
        (["--epochs=abc"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--model=mlp", "--hidden_sizes=64,32"], "64,32"),
        (["cnn"], "cnn"),
    ],
)
def test_a_mistyped_flag_is_named_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "with scikit-learn), one that --fork" in out  # the source breaks the line here
    out = " ".join(out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in out.replace("_", "-")
    assert "The optimizer's step size" in out


def test_the_overview_names_every_command(capsys):
    assert other_commands([]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S.*\.$", out, re.MULTILINE), name
    assert other_commands(["evalute"]) == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


def test_a_run_prints_a_line_per_epoch_and_ends_with_the_accuracy(capsys, data_dir, tmp_path):
    argv = digits(data_dir, tmp_path / "run", "--no_normalize")
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.fullmatch(r"test accuracy: \d+\.\d\d % \(\d+/360\)", lines[-1])
    assert len([line for line in lines if re.match(r"epoch +[12]/2 ", line)]) == 2
    assert all(len(line) <= 80 for line in lines if line.startswith("epoch"))
    assert "\x1b" not in out  # no terminal, no control codes
    assert train.main(argv) == 0  # the same command again
    again = capsys.readouterr().out.splitlines()
    assert "complete" in again[0]
    assert again[-1] == lines[-1]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--model=cn"], 2, "unknown model 'cn'"),
        (["--dataset=fashion"], 2, "did you mean fashion_mnist?"),
        (["--options", "gama=3"], 2, "gama is an argument of none of the model 'logistic', the "),
        (["--momentum=0.9"], 2, "none of the model 'logistic', the optimizer 'adam', the loss "),
        (["--epochs=0"], 2, "epochs is 0"),
        (["--batch_size=1438"], 2, "allowed is 1 to 1437"),
        (["--validation=1437"], 2, "validation is 1437"),
        (["--precision=tf32"], 2, "does not have; allowed here are bfloat16, float32"),
        (["--seeds=3", "--devices=2"], 6, "devices is 2; JAX finds 1 of cpu"),
        (["--platform=tpu"], 6, "no device for --platform=tpu"),
        (["--dataset=mnist", "--manual_dir=nowhere"], 3, "cannot read nowhere"),
        (["--learning_rate=1e38", "--model=mlp"], 5, "the loss or its gradient is not finite"),
        (["--profile=/dev/null/x"], 6, "/dev/null/x"),
    ],
)
def test_an_error_is_one_line_with_its_status(capsys, data_dir, tmp_path, more, status, message):
    assert train.main(digits(data_dir, tmp_path / "run", *more)) == status
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1
    if status != 5:  # all that is refused is refused before the folder is made
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("one\ntwo"), 1, "RuntimeError: one; this is a bug in mnist_jax; --debug"),
        (ModuleNotFoundError("No module named 'x'"), 1, "'x'; install the dependencies with: pip"),
        (MemoryError("cannot allocate 1 TB"), 6, "use another --platform"),
        (WorseError("b is worse"), 7, "b is worse"),
        (OSError(5, "Input/output error"), 6, "Input/output error; check the disk"),
        (OSError(28, "No space left on device"), 6, "free some space"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_any_exception_becomes_one_line(capsys, error, status, line):
    def command():
        raise error

    assert cli.exit_status(command, debug=False) == status
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys, data_dir, tmp_path):
    argv = digits(data_dir, tmp_path / "run", "--batch_size=99999", "--debug")
    assert train.main(argv) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run(number, status, data_dir, tmp_path):
    words = digits(data_dir, tmp_path / "run", "--epochs=100000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "train.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    assert any(re.match(r"epoch +\d", line) for line in process.stdout)  # waits for an epoch
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.fullmatch(r"interrupted at step \d+; to resume, run the same command .*\n", err)
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


def test_ctrl_c_during_the_imports_leaves_no_traceback(data_dir, tmp_path):
    program = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "flax.linen":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""
    done = run("-c", program, "train.py", *digits(data_dir, tmp_path / "run"))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_terminal_shows_a_progress_bar_and_the_same_lines(data_dir, tmp_path):
    words = digits(data_dir, tmp_path / "run", "--epochs=3", "--steps_per_call=3")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends the reading so when the process has ended
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait() == 0, text
    assert "compiling" in text
    assert re.search(r"epoch \d/3 .*\d+/15 .*images/s", text), text
    assert text.splitlines()[-1].startswith("test accuracy: ")
    assert shown.rfind(b"\x1b[?25h") >= shown.rfind(b"\x1b[?25l")  # the cursor is back


def test_a_closed_pipe_ends_the_run_quietly(data_dir, tmp_path):
    words = " ".join(digits(data_dir, tmp_path / "run", "--epochs=300"))
    line = f"{sys.executable} train.py {words} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


def test_compiled_programs_are_cached_for_the_next_start(data_dir, tmp_path):
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    cache = tmp_path / "compiled"

    def programs(number: int) -> list[str]:
        """The cached training programs; whether small ones are cached depends on the load."""
        words = digits(data_dir, tmp_path / str(number), f"--compilation_cache={cache}")
        command = [sys.executable, "train.py", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return [path.name for path in cache.glob("*train_steps*-cache")]

    first = programs(1)
    assert len(first) == 1
    assert programs(2) == first


def test_a_platform_that_the_environment_excludes_is_a_device_error(data_dir, tmp_path):
    done = run(
        "train.py", *digits(data_dir, tmp_path / "run", "--platform=gpu"), JAX_PLATFORMS="cuda"
    )
    assert done.returncode == 6
    assert "change --platform or JAX_PLATFORMS" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
