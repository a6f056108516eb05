"""`train.py` as a person meets it: flags, messages and exit statuses."""

import contextlib
import dataclasses
import itertools
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from benchmarks import launch
from mnist_jax import Config, cli
from mnist_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]


def parse(*argv: str):
    return cli.parse_config(argv, prog="train.py", description="")


def test_flags_reach_the_config_in_either_spelling():
    config = parse("--model=mlp", "--batch-size", "50", "--learning_rate=0.01", "--no-normalize")
    assert (config.model, config.batch_size, config.learning_rate) == ("mlp", 50, 0.01)
    assert config.normalize is False
    assert parse("--hidden_sizes", "64", "32", "--model=mlp").hidden_sizes == (64, 32)
    assert parse("--steps_per_call=7").steps_per_call == 7
    assert parse("--steps_per_call=auto").steps_per_call == "auto"
    assert parse("--profile=x", "--profile_steps", "3", "9").profile_steps == (3, 9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model=cn"], "unknown model 'cn'.*did you mean cnn"),
        (["--modle=cnn"], "unknown flag '--modle'; did you mean --model"),
        (["--no-normalise"], "did you mean --no_normalize"),
        (["--frobnicate"], "unknown flag '--frobnicate'; see --help"),
        (["--epochs=abc"], "^--epochs is 'abc'; allowed is a whole number; see --help$"),
        (["--epochs=1.5"], "^--epochs is '1.5'"),
        (["--epochs"], "^--epochs has no value; allowed is a whole number"),
        (["--epochs="], "^--epochs= has no value"),
        (["--model="], "^--model= has no value"),
        (["-epochs", "3"], "^unknown flag '-epochs'; did you mean --epochs"),
        (["--learning_rate=fast"], "is 'fast'; allowed is a number"),
        (["--steps_per_call=foo"], "is 'foo'; allowed is auto or a whole number"),
        (["--model=mlp", "--hidden_sizes=64,32"], "'64,32'; allowed is whole numbers with spaces"),
        (["--hidden_sizes", "64", "b"], "'64 b'"),
        (["--model=mlp", "--hidden_sizes"], "^--hidden_sizes has no value; allowed is whole numb"),
        (["--normalize=false"], "takes no value; write --normalize or --no_normalize"),
        (["--seed", "1", "2"], "^'2' belongs to no flag"),
        (
            ["--profile=x", "--profile_steps", "3"],
            "^--profile_steps is '3'; allowed is two whole n",
        ),
        (["cnn"], "^'cnn' belongs to no flag"),
        (["--model=CNNN"], "did you mean cnn"),
        (["--learning_rate=nan"], "learning_rate is nan; allowed is any finite number above 0"),
        (["--seed=-1"], "seed is -1"),
        (["Missing value for argument '--x'"], "belongs to no flag"),
    ],
)
def test_a_mistyped_command_is_answered_in_one_line(argv, message):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    text = str(caught.value)
    assert re.search(message, text, re.IGNORECASE), text
    assert "\n" not in text
    assert len(text) < 250


def test_a_choice_of_a_benchmark_that_is_none_is_answered_in_one_line():
    for words in (["--model", "cnn", "foo"], ["--model=foo"]):
        with pytest.raises(UsageError, match=r"^--model is 'foo'; allowed is logistic, mlp, cnn"):
            cli.parse(launch.Options, words, prog="", description="")


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({}, "--model=cnn"),
        ({"model": "mlp", "preset": "fast"}, "--model=mlp --preset=fast"),
        ({"model": "mlp", "hidden_sizes": (5, 6)}, "--model=mlp --hidden_sizes 5 6"),
        ({"normalize": False, "seeds": 3}, "--model=cnn --no_normalize --seeds=3"),
        ({"preset": "best", "epochs": 4}, "--model=cnn --preset=best --epochs=4"),
        ({"dropout": 0.0, "ema_decay": 0.99}, "--model=cnn --ema_decay=0.99 --dropout=0.0"),
        (
            {"data_dir": "a b;c", "deterministic": True},
            "--model=cnn --deterministic '--data_dir=a b;c'",
        ),
        ({"workdir": "x", "steps_per_call": 7, "report": True, "debug": True}, "--model=cnn"),
        (
            {"learning_rate": 1e-30, "validation": 5},
            "--model=cnn --learning_rate=1e-30 --validation=5",
        ),
    ],
)
def test_a_config_s_command_gives_the_same_config(fields, command):
    config = Config(**fields)
    assert config.command_line() == f"python train.py {command}"
    again = parse(*shlex.split(command))
    assert again.hyperparameters() == config.hyperparameters()
    assert (again.data_dir, again.deterministic) == (config.data_dir, config.deterministic)


def test_help_explains_every_flag_in_lines_as_long_as_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert train_status(["--help"]) == 0
    out = capsys.readouterr().out
    lines = [line[2:].rstrip(" │") for line in out.splitlines() if line[:2] in ("  ", "│ ")]
    text = " ".join(" ".join(lines).split())
    for field in dataclasses.fields(Config):
        assert re.search(rf"--{field.name}[ ,]", text)
    assert (
        "Adam's step size; with a --schedule that changes it, the highest. (default: 0.001)" in text
    )
    column = 22  # where the texts begin
    for line, after in itertools.pairwise(lines):
        if len(line) > column and after.startswith(" " * column):  # goes on with the same text
            assert len(f"{line} {after.split()[0]}") > 96 or line.startswith("--"), line


def train_status(argv: list[str]) -> int:
    try:
        return train.main(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def digits(data_dir: Path, workdir: Path, *more: str) -> list[str]:
    where = [f"--data_dir={data_dir}", f"--workdir={workdir}"]
    return ["--model=logistic", "--dataset=digits", "--epochs=2", *where, *more]


def test_a_run_prints_a_line_an_epoch_and_ends_with_the_accuracy(capsys, data_dir, tmp_path):
    argv = digits(data_dir, tmp_path / "run", "--no_normalize")
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "batch 100, Adam 0.001, normalize False, seed 1234" in out
    assert re.fullmatch(r"test accuracy: \d+\.\d\d % \(\d+/360\)", lines[-1])
    assert len([line for line in lines if line.startswith("epoch ")]) == 2
    assert "digits" in lines[0]
    assert re.search(r"total.*7,850", out)
    assert re.search(r"logits.*Dense.*10.*7,850", out)
    assert "\x1b" not in out  # no terminal, no control codes

    assert train.main(argv) == 0  # the same command again
    again = capsys.readouterr().out.splitlines()
    assert "complete" in again[0]
    assert again[-1] == lines[-1]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--epochs=0"], 2, "error: epochs is 0"),
        (["--batch_size=99999"], 2, "error: batch_size is 99999"),
        (["--precision=tf32"], 2, "error: precision is 'tf32'"),
        (["--platform=tpu"], 6, "error: no tpu device"),
        (["--dataset=mnist", "--manual_dir=nowhere"], 3, "error: --manual_dir=nowhere"),
        (
            ["--learning_rate=1e38", "--model=mlp"],
            5,
            "error: the loss or its gradient is not finite at step",
        ),
    ],
)
def test_exit_statuses(capsys, data_dir, tmp_path, more, status, message):
    assert train.main(digits(data_dir, tmp_path / "run", *more)) == status
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(capsys, data_dir, tmp_path):
    argv = digits(data_dir, tmp_path / "run", "--batch_size=99999", "--debug")
    assert train.main(argv) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_exits_with_1_in_one_line(capsys):
    def broken():
        raise RuntimeError("first line\nsecond line")

    assert cli.exit_status(broken, debug=False) == 1
    err = capsys.readouterr().err
    assert err == (
        "error: RuntimeError: first line; this is a bug in mnist_jax; --debug shows where\n"
    )


def test_a_package_that_is_missing_is_named_with_what_to_do(capsys):
    def lacking():
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert cli.exit_status(lacking, debug=False) == 1
    assert capsys.readouterr().err == (
        "error: No module named 'no_such_package'; install what is needed with: pip install .\n"
    )


def test_memory_that_runs_out_exits_with_6(capsys):
    def greedy():
        raise MemoryError("cannot allocate 1 TB")

    assert cli.exit_status(greedy, debug=False) == 6
    assert "smaller --batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_be_continued(number, status, data_dir, tmp_path):
    words = digits(data_dir, tmp_path / "run", "--epochs=100000")
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.fullmatch(r"interrupted at step \d+; the same command .*\n", err)
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


INTERRUPT_AT = """
import os, runpy, signal, sys
module, number = sys.argv[1], int(sys.argv[2])
class Finder:
    def find_spec(self, name, *rest):
        if name == module:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[3:]
if sys.argv[0] == "train.py":
    runpy.run_path("train.py", run_name="__main__")
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("module", ["jax", "flax.linen", "tyro"])
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_while_importing_ends_it(module, number, status, word, data_dir, tmp_path):
    for program in (
        ["train.py", *digits(data_dir, tmp_path / "run")],
        ["mnist_jax", "report", str(tmp_path)],
    ):
        words = [sys.executable, "-c", INTERRUPT_AT, module, str(int(number)), *program]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, f"{word}\n")


def test_a_terminal_shows_a_bar_and_the_same_lines(data_dir, tmp_path):
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
    with contextlib.suppress(OSError):  # how Linux ends the reading once the process has gone
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait() == 0, text
    assert "compiling" in text
    assert re.search(r"epoch 2/3 .*\d+/15  [\d,]+ images/s  \d+ s left  loss \d", text), text
    assert re.search(r"epoch 3/3  train loss [\d.]+ accuracy [\d.]+  test loss", text)
    assert text.splitlines()[-1].startswith("test accuracy: ")


def test_a_reader_that_goes_away_ends_the_run_quietly(data_dir, tmp_path):
    words = " ".join(digits(data_dir, tmp_path / "run", "--epochs=300"))
    line = f"{sys.executable} train.py {words} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


def test_compiled_programs_are_kept_for_the_next_start(data_dir, tmp_path):
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    kept = tmp_path / "compiled"

    def files(number: int, flag: str) -> set[str]:
        words = digits(data_dir, tmp_path / str(number), flag)
        command = [sys.executable, "train.py", *words]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        return {path.name for path in kept.glob("*-cache")}

    first = files(1, f"--compilation_cache={kept}")
    assert first
    assert files(2, f"--compilation_cache={kept}") == first


@pytest.mark.parametrize("program", [["train.py"], ["-m", "mnist_jax", "data"]])
def test_a_variable_that_jax_does_not_take_is_said_in_one_line(program):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "zzz"}
    words = [sys.executable, *program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "zzz" in line and "JAX_" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_the_status_is_right_where_nobody_reads_the_error(where):
    line = f"{sys.executable} train.py --epochs=0 {where}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_help_fits_into_any_terminal():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "3"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0


def test_a_platform_that_the_environment_rules_out_is_a_device_error(data_dir, tmp_path):
    words = digits(data_dir, tmp_path / "run", "--platform=gpu")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 6
    assert "JAX_PLATFORMS=cuda" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
