"""`train.py` and `python -m mnist_jax` as a user meets them: flags, messages, exit statuses."""

import dataclasses
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from jax.errors import JaxRuntimeError
from shared import ROOT

import train
from mnist_jax import Config, __main__, __version__, cli
from mnist_jax.data.sources import UnreachableError
from mnist_jax.errors import InterruptedRunError, WorseError
from mnist_jax.signals import catch_signals

TRAIN = (sys.executable, "-u", "train.py")
PROCESS = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def parse(*argv: str) -> Config:
    return cli.parse(Config, argv, prog="train.py", description="")


@pytest.fixture
def flags(data_dir, tmp_path):
    quick = ["--model=logistic", "--dataset=digits", "--epochs=2", f"--data_dir={data_dir}"]
    return lambda *more: [*quick, f"--workdir={tmp_path}/run", *more]


def test_flags_reach_the_config_in_either_spelling_and_in_that_of_other_programs():
    config = parse("--model=mlp", "--batch-size", "50", "--no-normalize")
    assert (config.model, config.batch_size, config.normalize) == ("mlp", 50, False)
    assert parse("--report=true", "--normalize=False") == Config(report=True, normalize=False)
    assert parse("--hidden_sizes", "64", "32", "--model=mlp").hidden_sizes == (64, 32)
    assert parse("--learning_rate", "0.1", "0.01").learning_rate == (0.1, 0.01)
    assert [parse(f"--steps_per_call={n}").steps_per_call for n in (7, "auto")] == [7, "auto"]
    config = parse("--lr=0.1", "--bs", "50", "--device", "cuda", "--model=CNN", "--preset=Fast")
    assert (config.learning_rate, config.batch_size, config.platform) == (0.1, 50, "cuda")
    assert (config.model, config.preset) == ("cnn", "fast")
    assert [parse(word).platform for word in ("--gpu", "--no_cuda")] == ["gpu", "cpu"]


@pytest.mark.parametrize("word", ["--modle=cnn", "--epochs=abc", "--hidden_sizes=64,32", "cnn"])
def test_a_mistyped_flag_is_named_with_status_2(word, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parse("--model=mlp", word)
    assert word.partition("=")[0] in (err := capsys.readouterr().err) and "{None}|" not in err


def test_help_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "with scikit-learn), one" in out  # the source breaks the line here
    out = " ".join(out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in out.replace("_", "-")
    assert "The optimizer's step size" in out
    assert "None}" not in out and "Default: the preset's (10; fast 4)." in out
    assert re.findall(r"(\w+) options [-─]", out) == list(Config.GROUPS)
    examples = out.split("example: python train.py ")[1:]
    assert len(examples) == 3 and all(parse(*words.split()) for words in examples)


def test_the_overview_names_every_command(capsys):
    assert __main__.main([]) == 0
    out = capsys.readouterr().out
    for name in ("train", *__main__.COMMANDS):
        assert re.search(rf"^  {name} +\S.*\.$", out, re.MULTILINE), name
    assert __main__.main(["evalute", "--debug=True"]) == 2
    assert re.search(r"Traceback(.*\n)+error: .* did you mean evaluate\?", capsys.readouterr().err)
    assert __main__.main(["--version"]) == 0
    assert f"mnist_jax {__version__}, jax " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--augmentation=mixup"], 2, "unknown augmentation 'mixup'; choose from "),
        (["--model=mlp", "--options", "dropout=7"], 2, "dropout is 7; allowed: 0 or more and"),
        (["--options", "name=x"], 2, "have no argument name"),  # a field of every Flax module
        (["--options", "a={[1]: 2}"], 2, "have no argument a to set;"),
        (["--optimizer=adamw", "--options", "b1=0,9"], 2, "a step with b1=0,9 fails: TypeError"),
        (["--optimizer=adamw", "--options", "nesterov=no"], 2, "is 'no'; allowed are True and"),
        (["--options", "a=1", "--options", "b=2"], 2, "--options is given twice; write"),
        (["--coordinator=a:70000", "--num_processes=2", "--process_id=0"], 2, "1 to 65535"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], 2, "allowed is 0 to 1"),
        (["--seed=4294967295", "--seeds=2"], 2, "seed + seeds is above 4294967296"),
        (["--log_steps"], 2, "--log_steps logs into --tensorboard; give both"),
        (["--momentum=0.9"], 2, "the optimizer 'adam' has no argument momentum to set; leave --"),
        (["--batch_size=1438"], 2, "allowed is 1 to 1437"),
        (["--validation=1437"], 2, "validation is 1437; allowed is 0 to 1436"),
        (["--precision=tf32"], 2, "does not have; allowed here are bfloat16, float32"),
        (["--seeds=3", "--devices=2"], 6, "devices is 2; JAX finds 1 (cpu); change --devices"),
        (["--dataset=mnist", "--manual_dir=nowhere"], 3, "cannot read nowhere"),
        (["--manual_dir=nowhere"], 2, "digits takes no --manual_dir; mnist, "),
        (["--learning_rate=1e38", "--model=mlp"], 5, "the loss or its gradient is not finite"),
        (["--validation=1300", "--learning_rate=6e33"], 5, "the validation loss is not finite"),
        (["--profile=/dev/null/x"], 6, "/dev/null/x"),
        (["--workdir=/dev/null/x"], 6, "run's folder /dev/null/x (Not a directory)"),
        ([f"--workdir={'x' * 300}"], 6, "(File name too long)"),
    ],
)
def test_an_error_is_one_line_with_its_status(capsys, flags, tmp_path, more, status, message):
    assert train.main(flags(*more)) == status
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1
    if status != 5:  # all that is refused is refused before the folder is made
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("one:\n two\n3"), 1, "RuntimeError: one: two; this is a bug in mnist_jax;"),
        (ModuleNotFoundError("No module named 'x'"), 1, "'x'; install mnist_jax again"),
        (MemoryError("cannot allocate 1 TB"), 6, "a smaller --batch_size or network, or f"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 1 TB"), 6, "use another --platform"),
        (UnreachableError("URL", "down"), 3, "cannot download URL: down; download the four files"),
        (WorseError("b is worse"), 7, "b is worse"),
        (InterruptedRunError("interrupted at step 3", 15), 143, "interrupted at step 3"),
        (OSError(5, "Input/output error"), 6, "Input/output error; check the disk"),
        (OSError(28, "No space left on device"), 6, "free some space"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_any_exception_becomes_one_line(capsys, monkeypatch, error, status, line):
    assert cli.exit_status(mock.Mock(side_effect=error), debug=False) == status
    err = capsys.readouterr().err
    assert (line in err, err.count("\n")) == (True, 1)
    error = pickle.loads(pickle.dumps(error))  # as it comes from a pool of processes
    monkeypatch.setattr(sys, "stdout", None)  # a process may have none
    assert cli.exit_status(mock.Mock(side_effect=error), debug=True) == status
    assert ("Traceback" in capsys.readouterr().err) == (status < 128)


@pytest.mark.parametrize("command", [["-m", "mnist_jax"], ["train.py"]])
def test_ctrl_c_while_jax_is_imported_ends_a_command_without_a_traceback(command, tmp_path):
    (tmp_path / "jax.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], env=environment, **PROCESS)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    def interrupt(*_):  # Python drops what a callback raises
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(interrupt)
    hook = sys.unraisablehook
    assert cli.exit_status(lambda: (gc.collect(), time.sleep(5)), debug=False) == 130
    assert sys.unraisablehook is hook


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with catch_signals(caught := []):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(KeyboardInterrupt):  # the second one ends it at once
                signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_ends_the_run_quietly(flags):
    words = " ".join(flags("--epochs=300"))
    for command in (f"train.py {words} | head -n 1", "-m mnist_jax --version | true"):
        line = f"env -u PYTHONUNBUFFERED {sys.executable} {command}; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], timeout=120, **PROCESS)
        assert (done.stdout.splitlines()[-1], done.stderr) == ("141", "")


def test_compiled_programs_are_cached_for_the_next_start(flags, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # set by conftest.py
    cache = tmp_path / "compiled"

    def programs(name: str) -> list[str]:
        """The cached training programs; whether small ones are cached depends on the load."""
        words = flags(f"--compilation_cache={cache}", f"--workdir={tmp_path / name}")
        subprocess.run([*TRAIN, *words], check=True, **PROCESS)
        return [path.name for path in cache.glob("*train_steps*-cache")]

    first = programs("first")
    assert len(first) == 1
    assert programs("second") == first


def test_a_platform_that_the_environment_excludes_is_a_device_error(flags, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    done = subprocess.run([*TRAIN, *flags("--platform=gpu")], **PROCESS)
    assert (done.returncode, "Traceback" in done.stderr) == (6, False)
    assert "change --platform or JAX_PLATFORMS" in done.stderr.splitlines()[-1]
