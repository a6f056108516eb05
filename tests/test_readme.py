"""What the README shows works as it stands there."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

import mnist_jax
from mnist_jax import __main__, cli, fit, models
from mnist_jax.config import Config

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"python train\.py [^`\n|]*", README)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ON_DIGITS = partial(Config, dataset="digits", max_steps=3)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m mnist_jax (\w+)", README))))
def test_other_commands_exist(command):
    with pytest.raises(SystemExit) as stop:
        __main__.main([command, "--help"])
    assert not stop.value.code


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_accepted(command):
    words = shlex.split(command.replace("--seed=S", "--seed=7"))[2:]
    if "--help" not in words:
        cli.parse_config(words, prog="train.py", description="")


def test_the_model_shown_trains(monkeypatch, tmp_path, data_dir):
    shown = next(code for code in PYTHON if "class Wide" in code)
    exec(shown, namespace := dict(vars(models)))
    monkeypatch.setitem(models.MODELS, "wide", namespace["MODELS"]["wide"])
    record = fit(ON_DIGITS(model="wide", data_dir=data_dir, workdir=tmp_path / "run")).record
    assert record["parameters"] == 785 * 4096 + 4097 * 10


def test_the_call_from_python_works(monkeypatch, tmp_path, data_dir, capsys):
    shown = next(code for code in PYTHON if "fit(" in code)
    here = {"data_dir": data_dir, "workdir": tmp_path / "run"}
    monkeypatch.setattr(mnist_jax, "Config", partial(ON_DIGITS, **here))
    exec(shown, {})
    assert "(784, 512)" in capsys.readouterr().out
