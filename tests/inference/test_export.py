"""`export`: another program gets the model that the run evaluated."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax import export as jax_export

from mnist_jax import Config, fit, load_dataset
from mnist_jax.data import DataSpec
from mnist_jax.inference import export
from mnist_jax.inference.restore import LoadedRun, Predictor
from mnist_jax.models import make_model, param_shapes

PAGE = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
LOADING = next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "deserial" in c)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), np.uint8)


def untrained(folder: Path, **fields) -> LoadedRun:
    config = Config(**fields).resolve()
    dtype = jax.numpy.bfloat16 if config.precision == "bfloat16" else None
    model = make_model(config.model, dtype=dtype, **config.arguments("model"))
    data = DataSpec("digits", (28, 28, 1), tuple("0123456789"))
    normal = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda leaf: normal(scale=0.03, size=leaf.shape).astype(leaf.dtype), param_shapes(model)
    )
    return LoadedRun(folder, config, data, model, [{"params": params}], 0, 0, [], {}, [])


def loaded(file: Path) -> jax_export.Exported:
    return jax_export.deserialize(bytearray(file.read_bytes()))


def test_the_documented_script_runs_without_this_package(tmp_path):
    run = untrained(tmp_path, model="mlp", hidden_sizes=(8,))
    found = export.export(run, "stablehlo", file := tmp_path / "model.stablehlo")
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    np.save(tmp_path / "images.npy", IMAGES)
    without = "import sys; sys.modules.update(mnist_jax=None, flax=None, optax=None)\n"
    compare = "\nnp.save('found.npy', jax.jit(probabilities)(np.load('images.npy')))"
    (tmp_path / "script.py").write_text(without + LOADING + compare)
    command = [sys.executable, "script.py"]
    subprocess.run(command, cwd=tmp_path, check=True)
    expected = Predictor(run, "cpu")(IMAGES).mean
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "precision", "marks", "tolerance"),
    [
        ("cnn", "float32", "HIGHEST", 1e-3),
        ("logistic", "tf32", r"precision = \[HIGH,", 1e-5),
        ("logistic", "bfloat16", "xbf16>", 1e-2),
    ],
)
def test_the_program_has_the_precision_of_the_run(model, precision, marks, tolerance, tmp_path):
    """It takes any number of images, and runs on all platforms."""
    sizes = {"hidden_sizes": (8,)} if model == "cnn" else {}
    run = untrained(tmp_path, model=model, precision=precision, **sizes)
    export.export(run, "stablehlo", tmp_path / "x")
    program = loaded(tmp_path / "x")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [str(aval) for aval in program.in_avals] == ["uint8[b,28,28,1]"]
    assert [str(aval) for aval in program.out_avals] == ["float32[b,10]"]
    assert re.search(marks, program.mlir_module())
    assert b".py" not in (tmp_path / "x").read_bytes()  # no path of this machine
    expected = Predictor(run, "cpu")(IMAGES).mean
    np.testing.assert_allclose(jax.jit(program.call)(IMAGES), expected, rtol=tolerance)


def test_both_formats_reproduce_the_accuracy_of_the_run(tmp_path, data_dir, command):
    """Of an EMA of the parameters, and images that are not scaled."""
    fields = {"model": "mlp", "hidden_sizes": (16,), "normalize": False, "ema_decay": 0.9}
    where = {"dataset": "digits", "data_dir": data_dir, "workdir": tmp_path / "run"}
    record = fit(Config(epochs=2, **where, **fields)).record
    test = load_dataset("digits", data_dir=data_dir).test
    for file_format in ("safetensors", "stablehlo"):  # the second replaces the first
        words = (tmp_path / "run", f"--format={file_format}", f"--output={tmp_path / 'x'}")
        status, out, err = command("export", *words)
        assert (status, err) == (0, "")
        assert out.endswith(f"test accuracy {100 * record['test_accuracy']:.2f} %\n")
        found = json.loads((tmp_path / "x.json").read_text())
        assert (found["version"], found["format"], found["seed"]) == (1, file_format, 1234)
        assert found["test_accuracy"] == record["test_accuracy"]
        assert found["classes"] == list("0123456789")
        assert str(tmp_path) not in json.dumps(found)
        if file_format == "safetensors":
            arrays = safetensors.numpy.load_file(tmp_path / "x")
            x = test.image.reshape(len(test.image), -1).astype(np.float32)
            x = np.maximum(x @ arrays["dense1/kernel"] + arrays["dense1/bias"], 0)
            predicted = np.argmax(x @ arrays["logits/kernel"] + arrays["logits/bias"], 1)
        else:
            predicted = np.argmax(loaded(tmp_path / "x").call(test.image), 1)
        assert int(np.sum(predicted == test.label)) == record["test_correct"]


def test_one_of_many_seeds_is_chosen_if_it_is_finite(copied, edit_params, command):
    folder = copied("many")
    record = json.loads((folder / "result.json").read_text())
    status, _, err = command("export", folder)
    assert (
        status,
        "member is None; the run has 0 (seed 1234), 1 (seed 1235), 2 (seed 1236); choose" in err,
    ) == (2, True)
    files = []
    for place, seed in enumerate((1234, 1235, 1236)):
        assert command("export", folder, f"--member={place}")[0] == 0
        files.append((folder / "model.safetensors").read_bytes())
        found = json.loads((folder / "model.safetensors.json").read_text())
        assert (found["seed"], found["test_accuracy"]) == (seed, record["test_accuracy"][place])
    assert len(set(files)) == 3
    edit_params(folder, lambda name, array: array[1].fill(np.nan))
    status, _, err = command("export", folder, "--member=1")
    assert (status, "seed 1235 of" in err) == (5, True)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--member=7", 2, "member is 7; the run has 0 (seed 5)"),
        (
            "--output={run}/nowhere/x",
            6,
            "nowhere/x (No such file or directory); choose another --output",
        ),
    ],
)
def test_mistakes(copied, command, words, status, message):
    folder = copied("one")
    before = sorted(folder.rglob("*"))
    found, _, err = command("export", folder, words.format(run=folder))
    assert (found, err.count("\n"), message in err) == (status, 1, True)
    assert sorted(folder.rglob("*")) == before
