import dataclasses
import functools
import json
import math
import shlex
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import pytest

from mnist_jax import AUGMENTATIONS, LOSSES, MODELS, Config, cli
from mnist_jax.config import PRESETS
from mnist_jax.errors import UsageError


def test_the_defaults_are_the_tutorials_recipe_and_a_given_value_wins(monkeypatch):
    config = Config().resolve()
    assert (config.model, config.epochs, config.batch_size) == ("cnn", 10, 100)
    assert (config.learning_rate, config.schedule, config.seed) == (1e-3, "constant", 1234)
    monkeypatch.setitem(PRESETS, "brief", {"epochs": 2, "shift": 1.0, "dropout": 0.3})
    config = Config(preset="brief", shift=0.0).resolve()
    assert (config.epochs, config.shift, config.dropout) == (2, 0.0, 0.3)
    assert Config(preset="brief", model="logistic").resolve().dropout is None
    monkeypatch.setitem(PRESETS, "wrong", {"lr": 0.1, "dataset": "mnist", "epochs": 2})
    with pytest.raises(UsageError, match="the preset 'wrong' sets lr, dataset; allowed are"):
        Config(preset="wrong").resolve()


def test_replace_takes_the_new_presets_and_models_values_and_resolve_settles_them():
    fast = dataclasses.replace(Config(model="mlp"), preset="fast")
    assert fast.resolve() == Config(model="mlp", preset="fast").resolve()
    assert fast.resolve().epochs == 4
    mlp = dataclasses.replace(Config(), model="mlp")
    options = {"hidden_sizes": (256, 128, 64, 32), "dropout": 0.0, "activation": "relu"}
    assert mlp.arguments("model") == options
    assert Config(model="logistic").arguments("model") == {}
    assert Config(optimizer="adamw").resolve().weight_decay == 1e-4
    twice = {"dropout": 0.0, "options": ("activation=Tanh", "dropout=0")}
    config = Config(model="mlp", preset="best", workdir=Path("~/run"), **twice).resolve()
    assert config.resolve() == config and config.arguments("model")["activation"] == "tanh"
    assert config.workdir == Path("~/run").expanduser()
    assert Config(compilation_cache=None).resolve().compilation_cache is None


def test_options_reach_arguments_without_a_default_and_models_are_classes(monkeypatch):
    def taught(logits, batch, *, teacher, share=0.5, steps=1): ...

    monkeypatch.setitem(LOSSES, "taught", taught)
    arguments = Config(loss="taught", options=("teacher=none", "share=0")).arguments("loss")
    assert arguments == {"teacher": "none", "share": 0}
    with pytest.raises(UsageError, match="have no argument steps to set; remove steps from"):
        Config(loss="taught", options=("steps=3",))  # the package's own name
    with pytest.raises(UsageError, match="--dropout and dropout of --options differ"):
        Config(dropout=0.5, options=("dropout=0.4",))
    monkeypatch.setitem(MODELS, "wide", functools.partial(MODELS["mlp"], hidden_sizes=(512,)))
    with pytest.raises(UsageError, match=r"the model 'wide' is no subclass of flax\.linen\.Module"):
        Config(model="wide")


def test_a_flag_sets_an_argument_of_one_component(monkeypatch):
    class Net(nn.Module):
        hidden_sizes: tuple  # without a default
        activation: Any = nn.relu  # not by name
        momentum: float = 0.9  # of its statistics

    monkeypatch.setitem(AUGMENTATIONS, "mix", lambda batch, key, *, alpha=0.2: batch)
    recipe = {"augmentation": "mix", "optimizer": "sgd", "momentum": 0.8, "epochs": 2}
    monkeypatch.setitem(PRESETS, "mixed", recipe)
    mixed = Config(preset="mixed", options=("alpha=1",))
    assert mixed.arguments("augmentation") == {"alpha": 1}
    assert (mixed.resolve().loss, mixed.optimizer_arguments()["momentum"]) == ("cross_entropy", 0.8)
    adam = dataclasses.replace(mixed, optimizer="adam").resolve()
    assert (adam.optimizer, adam.momentum, adam.epochs) == ("adam", None, 2)
    assert "--optimizer" not in mixed.command_line() and "--optimizer=adam" in adam.command_line()
    monkeypatch.setitem(MODELS, "net", Net)
    config = Config(model="net", optimizer="sgd", hidden_sizes=(8,), options=("activation=None",))
    assert config.arguments("model") == {"hidden_sizes": (8,), "activation": None}
    assert Config(model="net").resolve().activation is None
    assert "momentum" not in config.optimizer_arguments()
    assert dataclasses.replace(config, momentum=0.5).optimizer_arguments()["momentum"] == 0.5
    with pytest.raises(UsageError, match="'net' and the optimizer 'sgd' have an argument momentum"):
        dataclasses.replace(config, options=("activation=None", "momentum=0.5")).check_options()
    monkeypatch.setitem(PRESETS, "typo", {"optimizer": "SGD", "momentum": 0.9})
    with pytest.raises(UsageError, match=r"unknown optimizer 'SGD'; .*did you mean sgd"):
        Config(preset="typo", momentum=0.5)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("model", ["cn", ["cnn"]], "did you mean cnn"),
        ("preset", ["tutorials"], "did you mean tutorial"),
        ("platform", ["metal"], "choose from auto, cpu, .*gpu, .*tpu"),
        ("activation", ["sigmoid"], "the model 'cnn' has no argument activation to set; leave --"),
        ("options", [("gamma",), (3,), ("a=1", "a=2")], "words such as gamma=3, each name once"),
        ("options", [("num_classes=47",)], "have no argument num_classes to set; remove num"),
        ("dataset", [2**31, None], "a name or a path"),
        ("fork", [Path("nowhere.py")], "cannot read the fork nowhere.py: No such file"),
        ("epochs", [0, 1.5, "3"], "whole number, 1 or more"),
        ("batch_size", [-1, 100.0], "whole number, 1 or more"),
        ("learning_rate", [0.0, math.nan, math.inf, 10**400, "fast"], "above 0"),
        ("learning_rate", [(0.1, 0.1), ()], "or several different ones"),
        ("weight_decay", [10**400, (0.1, -1)], "from 0"),
        ("shift", [math.inf], "any finite number from 0"),
        ("label_smoothing", [1.0, -0.1], "less than 1"),
        ("dropout", [math.nan], "less than 1"),
        ("hidden_sizes", [(3, 0), ""], "whole numbers, 1 to 1000000"),
        ("seed", [-1, 2**32], "0 to 4294967295"),
        ("seeds", [0], "1 to 100000"),
        ("validation", [-1], "0 or more"),
        ("steps_per_call", [True, -5], "whole number, 1 or more"),
        ("checkpoint_every", [-1.0, math.inf], "any finite number from 0"),
        ("data_dir", [None, 5], "a folder"),
        ("workdir", [5], "a path"),
        ("devices", [0], "'all' or a whole number"),
        ("coordinator", ["localhost", 5, "a:0"], "auto or HOST:PORT"),
        ("coordinator", ["localhost:1"], "give all three or none"),
        ("num_processes", [2], "give all three or none"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_one_line(field, values, message):
    for value in values:
        with pytest.raises(UsageError, match=message) as caught:
            Config(**{field: value})
        assert "\n" not in str(caught.value)


def test_hyperparameters_are_what_can_change_a_number():
    here = Config(model="mlp", workdir=Path("a"), steps_per_call=7, platform="cpu", debug=True)
    here = dataclasses.replace(here, options=("dropout=0", "activation=relu"))
    there = Config(model="mlp", workdir=Path("b"), data_dir=Path("c"), dropout=0.0)
    there = dataclasses.replace(there, options=("activation=relu", "dropout=0"))
    assert here.hyperparameters() == there.hyperparameters()
    for other in ({"seed": 1}, {"epochs": 9}, {"deterministic": True}, {"max_steps": 5}):
        assert Config(model="mlp", **other).hyperparameters() != there.hyperparameters()


def test_members_are_the_grid_times_the_seeds():
    config = Config(learning_rate=(0.1, 0.2), weight_decay=[0.01], seed=5, seeds=2)
    rows = [(0.1, 0.01, 5), (0.1, 0.01, 6), (0.2, 0.01, 5), (0.2, 0.01, 6)]
    assert [tuple(member.values()) for member in config.members()] == rows
    assert config.member_labels()[1] == "learning_rate 0.1, weight_decay 0.01, seed 6"
    assert (Config().num_members, Config(seeds=1).num_members, config.num_members) == (None, 1, 4)


def test_numpy_numbers_and_lists_become_python_values_and_pass_through_json():
    several = {"learning_rate": tuple(np.logspace(-3, -1, 3)), "hidden_sizes": [64, np.int64(32)]}
    given = {"dropout": np.float64(0.5), "seed": np.arange(3)[2], "workdir": Path("a"), **several}
    config = Config(model="mlp", seeds=np.int8(2), **given).resolve()
    assert (config.dropout, config.seed, config.hidden_sizes) == (0.5, 2, (64, 32))
    assert type(config.dropout) is float and type(config.seed) is int
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({}, "--model=cnn"),
        ({"model": "mlp", "hidden_sizes": (5, 6)}, "--model=mlp --hidden_sizes 5 6"),
        ({"normalize": False, "seeds": 3}, "--model=cnn --no_normalize --seeds=3"),
        ({"preset": "best", "epochs": 4}, "--model=cnn --preset=best --epochs=4"),
        ({"dropout": 0.0, "ema_decay": 0.99}, "--model=cnn --ema_decay=0.99 --dropout=0.0"),
        (
            {"optimizer": "lion", "weight_decay": 0.0},
            "--model=cnn --optimizer=lion --weight_decay=0.0",
        ),
        ({"learning_rate": (0.1, 0.2)}, "--model=cnn --learning_rate 0.1 0.2"),
        ({"data_dir": Path("a b;c")}, "--model=cnn '--data_dir=a b;c'"),
        ({"manual_dir": "x", "platform": "cpu"}, "--model=cnn --manual_dir=x --platform=cpu"),
        ({"workdir": Path("x"), "steps_per_call": 7, "report": True}, "--model=cnn"),
    ],
)
def test_the_command_line_of_a_config_gives_the_same_run(fields, command):
    config = Config(**fields)
    assert config.command_line() == f"python train.py {command}"
    again = cli.parse(Config, shlex.split(command), prog="train.py", description="")
    assert again.hyperparameters() == config.hyperparameters()
    assert again.data_dir == config.data_dir
