import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mnist_jax.config import PRESETS, Config
from mnist_jax.errors import UsageError


def test_defaults_are_the_tutorials_recipe():
    config = Config()
    assert (config.model, config.epochs, config.batch_size) == ("cnn", 10, 100)
    assert (config.learning_rate, config.normalize, config.seed) == (1e-3, True, 1234)


def test_what_is_given_wins_over_the_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "brief", {**PRESETS["tutorial"], "epochs": 2, "normalize": False})
    config = Config(preset="brief", batch_size=7, normalize=True)
    assert (config.epochs, config.batch_size, config.normalize) == (2, 7, True)
    assert Config(preset="brief").normalize is False


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "cn", "did you mean cnn"),
        ("model", "", "choose from cnn, logistic, mlp"),
        ("dataset", "fashion", "did you mean fashion_mnist"),
        ("preset", "pots", "did you mean post"),
        ("precision", "float", "did you mean float32"),
        ("platform", "cuda", "choose from auto, cpu, gpu, tpu"),
        ("epochs", 0, "1 or more"),
        ("batch_size", 0, "1 or more"),
        ("batch_size", -1, "1 or more"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", -1e-3, "above 0"),
        ("learning_rate", math.nan, "above 0"),
        ("learning_rate", math.inf, "above 0"),
        ("learning_rate", 10**400, "above 0"),
        ("weight_decay", 10**400, "from 0"),
        ("seed", -1, "0 to 4294967295"),
        ("seed", 2**32, "0 to 4294967295"),
        ("max_steps", 0, "1 or more"),
        ("steps_per_call", 0, "1 or more"),
        ("microbatches", 0, "a power of two, 1 to 100, the --batch_size"),
        ("microbatches", 6, "a power of two"),
        ("microbatches", 128, "1 to 100"),
        ("profile_steps", (1, 2), "needs --profile=DIR"),
        ("steps_per_call", -5, "1 or more"),
        ("dropout", 1.0, "less than 1"),
        ("dropout", math.nan, "less than 1"),
        ("hidden_sizes", (3, 0), "up to 100 whole numbers, 1 to 1000000"),
        ("hidden_sizes", (10**30,), "1 to 1000000"),
        ("hidden_sizes", (1,) * 101, "up to 100"),
        ("hidden_sizes", "", "whole numbers"),
        ("workdir", "a\0b", r"'a\\x00b', which is no path .*change --workdir"),
        ("data_dir", "~\0", "no path"),
        ("manual_dir", "\ud800", "no path"),
        ("epochs", 1.5, "whole number"),
        ("epochs", "3", "whole number"),
        ("batch_size", 100.0, "whole number"),
        ("steps_per_call", True, "whole number"),
        ("seed", 1.5, "0 to 4294967295"),
        ("learning_rate", "fast", "above 0"),
        ("model", None, "choose from"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(field, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        Config(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [(0, 2), (3, 2), (1,), (1, 2.0), 5])
def test_a_window_that_cannot_be_profiled_is_refused(window):
    with pytest.raises(UsageError, match="two whole numbers, 1 or more, the first not above"):
        Config(profile=Path("trace"), profile_steps=window)


def test_options_a_model_does_not_have_are_refused():
    with pytest.raises(UsageError, match="'logistic' has no dropout"):
        Config(model="logistic", dropout=0.5)
    assert Config(model="mlp", hidden_sizes=()).hidden_sizes == ()


def test_the_models_own_options_stand_in_for_those_not_given():
    assert Config(model="mlp").model_options() == {
        "hidden_sizes": (256, 128, 64, 32),
        "dropout": 0.0,
        "activation": "relu",
    }
    assert (
        Config(model="cnn", dropout=0.5).hyperparameters() == Config(model="cnn").hyperparameters()
    )
    assert Config(model="logistic").model_options() == {}


def test_the_largest_seed_and_any_positive_rate_are_legal():
    assert Config(seed=2**32 - 1, learning_rate=1e30).learning_rate == 1e30


def test_identity_holds_what_can_change_a_number_and_nothing_else():
    here = Config(model="mlp", workdir=Path("a"), steps_per_call=7, platform="cpu", debug=True)
    there = Config(model="mlp", workdir=Path("b"), data_dir=Path("c"))
    assert here.hyperparameters() == there.hyperparameters()
    for other in ({"seed": 1}, {"epochs": 9}, {"precision": "bfloat16"}, {"max_steps": 5}):
        assert Config(model="mlp", **other).hyperparameters() != there.hyperparameters()
    assert json.loads(json.dumps(here.to_json()))["workdir"] == "a"


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("seeds", 0, "1 to 100000"),
        ("seeds", 2**32, "up to 4294967296"),
        ("validation", -1, "0 or more"),
        ("schedule", "onecicle", "did you mean onecycle"),
        ("activation", "rellu", "did you mean relu"),
        ("label_smoothing", 1.0, "less than 1"),
        ("ema_decay", -0.1, "less than 1"),
        ("shift", float("inf"), "any finite number from 0"),
        ("preset", "fastest", "did you mean fast"),
    ],
)
def test_a_recipe_s_value_that_is_not_allowed_is_refused(field, value, legal):
    with pytest.raises(UsageError, match=legal):
        Config(model="mlp", **{field: value})


def test_an_option_that_a_model_has_not_is_refused():
    with pytest.raises(UsageError, match="the model 'cnn' has no activation"):
        Config(model="cnn", activation="sigmoid")


def test_numbers_of_numpy_and_lists_are_taken_for_what_they_hold():
    config = Config(learning_rate=np.float64(0.5), seed=np.arange(3)[2], hidden_sizes=[64, 32])
    assert (config.learning_rate, config.seed, config.hidden_sizes) == (0.5, 2, (64, 32))
    assert type(config.learning_rate) is float and type(config.seed) is int
    hash(config)


def test_a_preset_names_parts_of_a_recipe_only(monkeypatch):
    monkeypatch.setitem(PRESETS, "short", {"epochs": 1})
    assert Config(preset="short").learning_rate == Config().learning_rate
    for name in ("precision", "learnig_rate"):
        monkeypatch.setitem(PRESETS, "odd", {name: "bfloat16"})
        with pytest.raises(UsageError, match=f"the preset 'odd' names {name}; allowed are epochs"):
            Config(preset="odd")
