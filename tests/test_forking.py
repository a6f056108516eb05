"""The forks of docs/forking.md: trained, resumed, and read from their folders alone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import safetensors.numpy
import small
from shared import StopAfter, python, rows_without_times, write_forks

from mnist_jax import OPTIMIZERS, Callback, Config, fit
from mnist_jax.errors import InterruptedRunError, UsageError
from mnist_jax.models import make_model
from mnist_jax.runs.results import params_sha256

SMALL = {"model": "mlp", "hidden_sizes": (16,), "learning_rate": 0.01}
NORMED = {"fork": "HERE/norm.py", "model": "norm"}
RECIPES = {"fork": "HERE/recipes.py", "learning_rate": 0.01}
OPTIONS = ["gamma=3", "alpha=0.4", "rho=0.1"]
RESNET = {"fork": "HERE/resnet.py", "model": "resnet", "learning_rate": 0.01}
# The fields of a run of each fork; HERE holds the fork's file, the data and the teacher's run.
FORKS: dict[str, dict[str, Any]] = {
    "norm": {**NORMED, "options": ["width=8"], "batch_size": 200, "ema_decay": 0.9},
    "letters": {"fork": "HERE/emnist.py", "dataset": "letters", "options": ["folder=HERE/emnist"]},
    "sam": {"fork": "HERE/recipes.py", "preset": "smooth", "loss": "focal", "options": OPTIONS},
    "distill": {**RECIPES, "loss": "distill", "options": ["teacher=HERE/teacher", "share=0.9"]},
}
LONG: dict[str, dict[str, Any]] = {
    "resnet": {**RESNET, "options": ["width=4", "blocks=1"], "ema_decay": 0.9},
    "penalty": {**RESNET, "options": ["width=4", "blocks=1", "penalty=1.0"], "seeds": 2},
    "focal": {**RECIPES, "loss": "focal", "options": ["gamma=3"]},
    "grid": {**SMALL, "learning_rate": [0.0001 * 2**n for n in range(8)]},
    "norms": {**NORMED, "seeds": 2},
    "colour": {**SMALL, "dataset": "HERE/colour.npz"},
    "sgd": {**SMALL, "optimizer": "sgd", "momentum": 0.9, "schedule": "cosine"},
    "muon": {**SMALL, "optimizer": "muon", "weight_decay": 0.01},
    "squared_error": {**RECIPES, "loss": "squared_error"},
    "warm": {"init_from": "HERE/teacher"},
}
# A network with BatchNorm that compiles fast.
NORM = """
import flax.linen as nn

from mnist_jax import MODELS
from mnist_jax.models import LogisticRegression


class Norm(LogisticRegression):
    width: int = 16

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = nn.Dense(self.width, use_bias=False)(x.reshape((x.shape[0], -1)))
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        x = norm(x, mask=None if mask is None else mask[:, None])
        return nn.Dense(self.num_classes)(nn.relu(x))


MODELS["norm"] = Norm
"""


class Watch(StopAfter):
    """Counts the steps whose values it gets."""

    steps = 0

    def on_warning(self, message): ...

    def on_steps(self, first, values):
        self.steps += values["grad_norm"].shape[-1]


def prepare(folder: Path) -> str:
    """Fills a folder with the forks' files, small data, and a teacher that keeps an EMA."""
    write_forks(folder)
    (folder / "norm.py").write_text(NORM)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 28, 28), np.uint8), np.arange(300) % 26 + 1
    arrays = (images, labels, images[:60], labels[:60])
    small.write_idx(folder / "emnist", arrays, "emnist-letters-", "")
    x, y = rng.integers(0, 256, (300, 32, 32, 3), np.uint8), np.arange(300) % 47
    np.savez(folder / "colour.npz", x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
    teacher = {"model": "logistic", "dataset": "digits", "epochs": 6, "ema_decay": 0.9}
    fit(Config(**teacher, data_dir=folder / "data", workdir=folder / "teacher"))
    return str(folder)


def config_of(name: str, folder: Path, **fields: Any) -> Config:
    given = {"model": "logistic", "dataset": "digits", "epochs": 3, **(FORKS | LONG)[name]}
    found = json.loads(json.dumps(given).replace("HERE", str(folder)))
    found |= {"data_dir": folder / "data", "workdir": folder / "run", "steps_per_call": 5}
    return Config(**{**found, **fields}).resolve()


def outcome(result: Any) -> Any:
    digest = params_sha256({"params": result.params, **result.model_state})
    return json.loads(json.dumps([digest, rows_without_times(result.workdir)]))


def train(name: str, folder: Path, source: Path) -> dict[str, Any]:
    """Runs of a fork, one of them interrupted and resumed; then removes all that is not theirs."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    # Logged as the others: the logging program of a convolution may round differently.
    result = fit(config_of(name, folder), callbacks=[Watch()])
    part = config_of(name, folder, workdir=folder / "part", checkpoint_every=0)
    watch, resumed = Watch(events=2), Watch()
    with pytest.raises(InterruptedRunError):
        fit(part, callbacks=[watch])
    again = fit(part, callbacks=[resumed])
    complete = fit(config_of(name, folder))  # reads what the run left
    found = {
        "folder": str(result.workdir),
        "record": result.record,
        "states": list(result.model_state),
        "outcome": outcome(result),
        "others": [outcome(again), outcome(complete)],
        "steps": watch.steps + resumed.steps,
    }
    for path in folder.iterdir():
        if path.name not in ("run", "data", "emnist", "colour.npz"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


@pytest.fixture(scope="session")
def source(once) -> Path:
    return Path(once("forks", prepare))


@pytest.fixture(scope="session")
def trained(once, source):
    """(name) → what `train` found."""
    return lambda name: once(f"fork-{name}", lambda folder: train(name, folder, source))


def campaign(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.campaign) for name in names]


@pytest.mark.parametrize("name", [*FORKS, *campaign(*LONG)])
def test_a_fork_is_trained_and_resumed_to_the_same_bits(trained, name):
    found = trained(name)
    assert found["others"] == [found["outcome"]] * 2
    assert found["steps"] == found["record"]["steps"] > 5
    rows, given = found["outcome"][1], (FORKS | LONG)[name]
    assert np.min(rows[-1]["train/loss"]) < np.min(rows[0]["train/loss"])
    assert found["states"] == (["batch_stats"] if given.get("model") in ("norm", "resnet") else [])
    # Not for random images, mixed images, and a tiny network.
    if given.get("dataset") is None and given.get("model") != "resnet" and name != "sam":
        assert np.max(rows[-1]["train/accuracy"]) > 0.3


READ = """
import json, sys
import numpy as np
from jax import export
from mnist_jax import evaluate, load_run, predict
from mnist_jax.inference.restore import dataset_of
from mnist_jax.__main__ import main

for folder in sys.argv[1:]:
    image = dataset_of(load_run(folder)).test.image[:8]
    found = evaluate(folder)
    words = ["export", folder, "--format=stablehlo", "--member=0", f"--output={folder}/program"]
    assert main(words) == 0
    program = export.deserialize(bytearray(open(f"{folder}/program", "rb").read()))
    probabilities = predict(folder, image)
    exported = np.asarray(program.call(image))
    print(json.dumps({
        "correct": [member["correct"] for member in found["members"]],
        "shapes": [probabilities.shape, exported.shape],
        "same": len(found["members"]) > 1 or bool(np.allclose(probabilities, exported, atol=1e-5)),
    }))
"""


@pytest.mark.parametrize("names", [FORKS, pytest.param(LONG, marks=pytest.mark.campaign)])
def test_forks_are_read_in_another_process(trained, tmp_path, names):
    """It evaluates, predicts and exports, from the runs' folders alone."""
    found = [trained(name) for name in names]
    folders = [run["folder"] for run in found]
    printed = python("-W", "error", "-c", READ, *folders, cwd=tmp_path).stdout
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    for run, read in zip(found, lines, strict=True):
        config = json.loads((Path(run["folder"]) / "config.json").read_text())
        classes = len(config["data"]["class_names"])
        assert read["correct"] == np.ravel(run["record"]["test_correct"]).tolist()
        assert read["shapes"] == [[8, classes]] * 2
        assert read["same"]


def test_the_networks_of_the_page_take_any_images(source):
    Config(fork=source / "resnet.py")
    make_model("resnet", image_shape=(33, 32, 3), num_classes=47, width=4, penalty=0.1)


def test_a_changed_fork_is_another_run(source, tmp_path):
    fork = tmp_path / "fork.py"
    shutil.copy(source / "recipes.py", fork)
    config = config_of("focal", source, fork=fork, workdir=tmp_path / "run", max_steps=3)
    fit(config)
    own = tmp_path / "run" / "fork.py"
    assert own.read_bytes() == fork.read_bytes()
    fit(dataclasses.replace(config, fork=own))
    for name in ("result.json", "metrics.jsonl", "manifest.sha256"):  # as before a first checkpoint
        (own.parent / name).unlink()
    shutil.rmtree(own.parent / "checkpoints")
    fit(dataclasses.replace(config, fork=own))
    assert own.read_bytes() == fork.read_bytes()
    fork.write_text(fork.read_text() + "# changed\n")
    with pytest.raises(UsageError, match=r"differs in fork \(was '[0-9a-f]{64}', now"):
        fit(config)


def test_a_fork_that_is_not_used_warns_and_one_edited_meanwhile_is_refused(config, tmp_path):
    (fork := tmp_path / "fork.py").write_text(NORM)
    with pytest.warns(UserWarning, match=r"uses nothing that .* adds; it adds --model=norm$"):
        fit(config(fork=fork, max_steps=1), callbacks=[])

    class Edit(Callback):
        def on_data_loaded(self, dataset):
            fork.write_text(NORM + "# edited")

    run = config(fork=fork, model="norm", workdir=tmp_path / "edited")
    with pytest.raises(UsageError, match=r"fork.py changed while the run started; start it again"):
        fit(run, callbacks=[Edit()])
    assert not run.workdir.exists()


WRAPPED = {
    "clip": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    "multi": lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(),
    "finite": lambda rate: optax.apply_if_finite(optax.adam(rate), max_consecutive_errors=2),
    "inject": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
}


@pytest.mark.parametrize("name", ["clip", *campaign("multi", "finite", "inject")])
def test_a_wrapped_optimizer_trains_and_its_run_keeps_an_ema(config, monkeypatch, name):
    monkeypatch.setitem(OPTIMIZERS, "wrapped", WRAPPED[name])
    run = config(optimizer="wrapped", ema_decay=0.5, max_steps=4, schedule="cosine")
    kernel = fit(run).params["logits"]["kernel"]
    arrays = safetensors.numpy.load_file(max(run.workdir.glob("checkpoints/*.safetensors")))
    ema, last = (arrays[f"state/{tree}/logits/kernel"] for tree in ("ema", "params"))
    np.testing.assert_allclose(kernel, ema / (1 - 0.5**4), rtol=1e-5)
    assert not np.array_equal(kernel, last)


ON_DEVICES = """
import sys
import numpy as np
from pathlib import Path
from mnist_jax import Config, fit
import jax

folder = Path(sys.argv[1])
fields = {"model": "norm", "dataset": "digits", "optimizer": "sgd", "learning_rate": 0.1}
fields |= {"fork": folder / "norm.py", "data_dir": folder / "data", "epochs": 1}
states = []
for devices in (1, 8):
    result = fit(Config(devices=devices, workdir=Path(f"run{devices}"), **fields), callbacks=[])
    states.append((result.params, result.model_state))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *states)
print("equal", sorted(states[0][1]))
"""


@pytest.mark.campaign
def test_batch_statistics_over_eight_devices_equal_those_of_one(source, tmp_path):
    """100 images on 8 devices are 13 rows each: padding, which the mask leaves out."""
    done = python("-W", "error", "-c", ON_DEVICES, source, cwd=tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert done.stdout == "equal ['batch_stats']\n"
