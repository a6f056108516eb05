"""The forks of docs/forking.md: trained, resumed, and read from their folders alone."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import safetensors.numpy
import small
from shared import rows_without_times, write_forks

from mnist_jax import OPTIMIZERS, Callback, Config, fit, load_run
from mnist_jax.errors import InterruptedRunError, UsageError
from mnist_jax.models import make_model
from mnist_jax.runs.results import params_sha256
from mnist_jax.signals import Stop

ROOT = Path(__file__).parents[1]
SMALL = {"model": "mlp", "hidden_sizes": (16,), "learning_rate": 0.01}
RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)
RECIPES = {"model": "logistic", "learning_rate": 0.01, "fork": "FOLDER/recipes.py"}
RESNET = {"fork": "FOLDER/resnet.py", "model": "resnet", "learning_rate": 0.01}
# The fields of a run of each fork; FOLDER holds the fork's file, the data and the teacher's run.
FORKS: dict[str, dict[str, Any]] = {
    "norm": {
        "fork": "FOLDER/norm.py",
        "model": "norm",
        "options": ("width=8",),
        "batch_size": 200,
        "ema_decay": 0.9,
    },
    "letters": {
        "fork": "FOLDER/emnist.py",
        "model": "logistic",
        "dataset": "letters",
        "options": ("folder=FOLDER/emnist",),
    },
    "sam": {
        **RECIPES,
        "loss": "focal",
        "optimizer": "sam",
        "augmentation": "mixup",
        "learning_rate": 0.1,
        "options": ("gamma=3", "alpha=0.4", "rho=0.1"),
    },
    "distill": {
        **RECIPES,
        "loss": "distill",
        "options": ("teacher=FOLDER/teacher", "share=0.9"),
    },
}
LONG: dict[str, dict[str, Any]] = {
    "resnet": {**RESNET, "options": ("width=4", "blocks=1"), "ema_decay": 0.9},
    "penalty": {**RESNET, "options": ("width=4", "blocks=1", "penalty=1.0"), "seeds": 2},
    "focal": {**RECIPES, "loss": "focal", "options": ("gamma=3",)},
    "grid": {**SMALL, "learning_rate": RATES},
    "norms": {"fork": "FOLDER/norm.py", "model": "norm", "seeds": 2},
    "colour": {**SMALL, "dataset": "FOLDER/colour.npz"},
    "sgd": {**SMALL, "optimizer": "sgd", "momentum": 0.9, "schedule": "cosine"},
    "muon": {**SMALL, "optimizer": "muon", "weight_decay": 0.01},
    "squared_error": {**RECIPES, "loss": "squared_error"},
    "slow": {**RECIPES, "preset": "slow"},
    "warm": {"model": "logistic", "init_from": "FOLDER/teacher"},
}
NORMED = ("norm", "resnet")
# A network with BatchNorm that compiles fast.
NORM = """
from typing import Any

import flax.linen as nn

from mnist_jax import MODELS


class Norm(nn.Module):
    num_classes: int
    image_shape: tuple[int, int, int]
    dtype: Any = None
    width: int = 16

    @nn.compact
    def __call__(self, x, *, train=False, mask=None):
        x = nn.Dense(self.width, use_bias=False)(x.reshape((x.shape[0], -1)))
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        x = norm(x, mask=None if mask is None else mask[:, None])
        return nn.Dense(self.num_classes)(nn.relu(x))


MODELS["norm"] = Norm
"""


class Watch(Callback):
    """Stops the run after some calls of the training program; keeps the steps' values."""

    def __init__(self, calls: int = 0):
        self.stop, self.calls, self.norms = Stop(), calls, []

    def on_steps(self, first, values):
        self.norms.append(values["grad_norm"])

    def on_chunk_end(self, epoch, batch, num_batches, metrics, train_s):
        self.calls -= 1
        if self.calls == 0:
            self.stop.signal = signal.SIGTERM


def prepare(folder: Path) -> None:
    """The forks' files, small data, and a teacher that keeps an EMA."""
    write_forks(folder)
    (folder / "norm.py").write_text(NORM)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 28, 28), np.uint8), np.arange(300) % 26 + 1
    (folder / "emnist").mkdir()
    arrays = (images, labels, images[:60], labels[:60])
    for name, array in zip(small.NAMES, arrays, strict=True):
        file = folder / "emnist" / f"emnist-letters-{name.removesuffix('.gz')}"
        file.write_bytes(small.idx(array.astype(np.uint8)))
    x, y = rng.integers(0, 256, (300, 32, 32, 3), np.uint8), np.arange(300) % 47
    np.savez(folder / "colour.npz", x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
    teacher = {"model": "logistic", "dataset": "digits", "epochs": 6, "ema_decay": 0.9}
    fit(Config(**teacher, data_dir=folder / "data", workdir=folder / "teacher"))


def config_of(name: str, folder: Path, **fields: Any) -> Config:
    given = {"dataset": "digits", "epochs": 3, **(FORKS | LONG)[name]}
    found = json.loads(json.dumps(given).replace("FOLDER", str(folder)))
    found |= {"data_dir": folder / "data", "workdir": folder / "run", "steps_per_call": 5}
    return Config(**{**found, **fields}).resolve()


def outcome(result: Any) -> Any:
    """A digest of the parameters and the state, and the epochs."""
    digest = params_sha256({"params": result.params, **result.model_state})
    return json.loads(json.dumps([digest, rows_without_times(result.workdir)]))


def train(name: str, folder: Path, source: Path) -> dict[str, Any]:
    """Runs of a fork, one of them interrupted and resumed; then removes all that is not theirs."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    # Logged as the others: the logging program of a convolution may round differently.
    result = fit(config_of(name, folder), callbacks=[Watch()])
    part = config_of(name, folder, workdir=folder / "part", checkpoint_every=0)
    watch, resumed = Watch(calls=2), Watch()
    with pytest.raises(InterruptedRunError):
        fit(part, callbacks=[watch], stop=watch.stop)
    again = fit(part, callbacks=[resumed])
    complete = fit(config_of(name, folder))  # reads what the run left
    found = {
        "folder": str(result.workdir),
        "record": result.record,
        "states": list(result.model_state),
        "outcome": outcome(result),
        "others": [outcome(again), outcome(complete)],
        "steps": sum(norms.shape[-1] for norms in watch.norms + resumed.norms),
    }
    for path in folder.iterdir():
        if path.name not in ("run", "data", "emnist", "colour.npz"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


@pytest.fixture(scope="session")
def source(once) -> Path:
    """The folder that `prepare` fills."""
    return Path(once("forks", lambda folder: (prepare(folder), str(folder))[1]))


@pytest.fixture(scope="session")
def trained(once, source):
    """(name) → what `train` found."""
    return lambda name: once(f"fork-{name}", lambda folder: train(name, folder, source))


long = [pytest.param(name, marks=pytest.mark.campaign) for name in LONG]


@pytest.mark.parametrize("name", [*FORKS, *long])
def test_a_fork_is_trained_and_resumed_to_the_same_bits(trained, name):
    found = trained(name)
    assert found["others"] == [found["outcome"]] * 2
    assert found["steps"] == found["record"]["steps"] > 5
    rows, given = found["outcome"][1], (FORKS | LONG)[name]
    assert np.min(rows[-1]["train/loss"]) < np.min(rows[0]["train/loss"])
    assert found["states"] == (["batch_stats"] if given.get("model") in NORMED else [])
    # Not for random images, mixed images, and a tiny network.
    if given.get("dataset") is None and given.get("model") != "resnet" and name != "sam":
        assert np.max(rows[-1]["train/accuracy"]) > 0.3


READ = """
import json, sys
import numpy as np
from mnist_jax import evaluate, load_run, predict
from mnist_jax.inference.restore import dataset_of
from mnist_jax.__main__ import main

for folder in sys.argv[1:]:
    image = dataset_of(load_run(folder)).test.image[:8]
    found = evaluate(folder)
    words = ["export", folder, "--format=stablehlo", "--member=0", f"--output={folder}/program"]
    assert main(words) == 0
    from jax import export
    program = export.deserialize(bytearray(open(f"{folder}/program", "rb").read()))
    probabilities = predict(folder, image)
    exported = np.asarray(program.call(image))
    print(json.dumps({
        "correct": [member["correct"] for member in found["members"]],
        "shapes": [probabilities.shape, exported.shape],
        "same": len(found["members"]) > 1 or bool(np.allclose(probabilities, exported, atol=1e-5)),
    }))
"""


def check_reading(found: list[dict[str, Any]], place: Path) -> None:
    """Another process evaluates, predicts and exports, from the runs' folders alone."""
    command = [sys.executable, "-W", "error", "-c", READ, *(run["folder"] for run in found)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for run, read in zip(found, lines, strict=True):
        data = json.loads((Path(run["folder"]) / "config.json").read_text())["data"]
        classes = len(data["class_names"])
        assert read["correct"] == np.ravel(run["record"]["test_correct"]).tolist()
        assert read["shapes"] == [[8, classes]] * 2
        assert read["same"]


def test_forks_are_read_in_another_process(trained, tmp_path):
    check_reading([trained(name) for name in FORKS], tmp_path)


@pytest.mark.campaign
def test_all_forks_are_read_in_another_process(trained, tmp_path):
    check_reading([trained(name) for name in LONG], tmp_path)


def test_the_networks_of_the_page_take_any_images(source):
    Config(fork=source / "resnet.py")
    make_model("resnet", image_shape=(33, 32, 3), num_classes=47, width=4, penalty=0.1)


def test_a_changed_fork_is_another_run(source, tmp_path):
    fork = tmp_path / "fork.py"
    shutil.copy(source / "recipes.py", fork)
    config = config_of("focal", source, fork=fork, workdir=tmp_path / "run", max_steps=3)
    fit(config)
    assert (tmp_path / "run" / "fork.py").read_bytes() == fork.read_bytes()
    fit(dataclasses.replace(config, fork=tmp_path / "run" / "fork.py"))
    fork.write_text(fork.read_text() + "# changed\n")
    with pytest.raises(UsageError, match=r"differs in fork \(was '[0-9a-f]{64}', now"):
        fit(config)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\nx.y", "fails in line 2: AttributeError: 'int' object has no attribute 'y'"),
        ("def f(:", "fails in line 1: SyntaxError: invalid syntax"),
        ("exit(3)", "fails in line 1: SystemExit: 3"),
        ("", "unknown loss 'focal2'; choose from cross_entropy"),
    ],
)
def test_a_fork_that_fails_is_a_usage_error(tmp_path, code, message):
    (tmp_path / "fork.py").write_text(code)
    with pytest.raises(UsageError, match=message):
        Config(fork=tmp_path / "fork.py", loss="focal2")
    with pytest.raises(UsageError, match=r"cannot read the fork .*: No such file"):
        Config(fork=tmp_path / "absent.py")


WRAPPED = {
    "clip": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
    "multi": lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(),
    "finite": lambda rate: optax.apply_if_finite(optax.adam(rate), max_consecutive_errors=2),
    "inject": lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "clip" else pytest.mark.campaign) for name in WRAPPED],
)
def test_a_wrapped_optimizer_trains_and_its_run_keeps_an_ema(config, monkeypatch, name):
    monkeypatch.setitem(OPTIMIZERS, "wrapped", WRAPPED[name])
    run = config(optimizer="wrapped", ema_decay=0.5, max_steps=4, schedule="cosine")
    kernel = fit(run).params["logits"]["kernel"]
    arrays = safetensors.numpy.load_file(max(run.workdir.glob("checkpoints/*.safetensors")))
    ema, last = (arrays[f"state/{tree}/logits/kernel"] for tree in ("ema", "params"))
    np.testing.assert_allclose(kernel, ema / (1 - 0.5**4), rtol=1e-5)
    assert not np.array_equal(kernel, last)
    np.testing.assert_array_equal(
        load_run(run.workdir).members[0]["params"]["logits"]["kernel"], kernel
    )


ON_DEVICES = """
import sys
import numpy as np
from pathlib import Path
from mnist_jax import Config, fit
import jax

folder = Path(sys.argv[1])
states = []
for devices in (1, 8):
    config = Config(fork=folder / "norm.py", model="norm", dataset="digits", epochs=1,
                    optimizer="sgd", learning_rate=0.1,
                    devices=devices, data_dir=folder / "data", workdir=Path(f"run{devices}"))
    result = fit(config)
    states.append((result.params, result.model_state))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *states)
print("equal", sorted(states[0][1]))
"""


@pytest.mark.campaign
def test_batch_statistics_over_eight_devices_equal_those_of_one(source, tmp_path):
    """100 images on 8 devices are 13 rows each: padding, which the mask leaves out."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-W", "error", "-c", ON_DEVICES, str(source)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal ['batch_stats']\n"
