"""`export`: another program gets the model that the run evaluated."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax import export as jax_export
from shared import ROOT, python

from mnist_jax import Config, fit
from mnist_jax.data import DataSpec
from mnist_jax.errors import UsageError
from mnist_jax.inference import export
from mnist_jax.inference.restore import LoadedRun, Predictor
from mnist_jax.models import MODELS, LogisticRegression, make_model, variable_shapes

PAGE = (ROOT / "docs" / "running.md").read_text()
LOADING = next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "deserial" in c)
[NAME] = re.findall(r"--format=stablehlo --output=(\S+)", PAGE)  # which LOADING reads
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), np.uint8)
# Compiles faster: without LLVM's passes, but with XLA's.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def untrained(folder: Path, **fields) -> LoadedRun:
    config = Config(**fields).resolve()
    dtype = jax.numpy.bfloat16 if config.precision == "bfloat16" else None
    model = make_model(config.model, dtype=dtype, **config.arguments("model"))
    data = DataSpec("digits", (28, 28, 1), tuple("0123456789"))
    shapes, normal = variable_shapes(model)[0], np.random.default_rng(0).normal
    params = jax.tree.map(lambda x: normal(scale=0.03, size=x.shape).astype(x.dtype), shapes)
    return LoadedRun(folder, config, data, model, [(params, {})], 0, [], {}, [])


def loaded(file: Path) -> jax_export.Exported:
    return jax_export.deserialize(bytearray(file.read_bytes()))


def test_the_documented_script_runs_without_this_package(tmp_path):
    run = untrained(tmp_path, model="mlp", hidden_sizes=(8,))
    run = run._replace(rows=[{"step": 15, "test/accuracy": 0.9}], step=20)
    found = export.export(run, "stablehlo", file := tmp_path / NAME)
    assert found["test_accuracy"] is None  # that of step 15 is another network's
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    np.save(tmp_path / "images.npy", IMAGES)
    without = "import sys; sys.modules.update(mnist_jax=None, flax=None, optax=None)\n"
    compare = "\nnp.save('found.npy', jax.jit(probabilities)(np.load('images.npy')))"
    (tmp_path / "script.py").write_text(without + LOADING + compare)
    python("script.py", cwd=tmp_path)
    expected = Predictor(run, "cpu")(IMAGES).mean
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=1e-4, atol=1e-6)


def test_the_cnn_can_be_rebuilt_from_its_file_and_description(tmp_path):
    run = untrained(tmp_path, model="cnn", hidden_sizes=(16, 8))
    description = export.export(run, "safetensors", file := tmp_path / "model.safetensors")
    p = safetensors.numpy.load_file(file)
    assert 'conv3x3(256, name="conv4", padding="VALID"' in description["code"]
    assert "stride 1, padding SAME if none is named" in description["conventions"]

    def conv(x: np.ndarray, name: str, border: int) -> np.ndarray:
        x = np.pad(x, [(0, 0), (border, border), (border, border), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        y = np.einsum("bhwcij,ijco->bhwo", windows, p[f"{name}/kernel"], optimize=True)
        return np.maximum(y + p[f"{name}/bias"], 0)

    def pool(x: np.ndarray) -> np.ndarray:
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    x = pool(conv(conv(IMAGES / 255, "conv1", 1), "conv2", 1))
    x = pool(conv(conv(x, "conv3", 1), "conv4", 0)).reshape(len(IMAGES), -1)
    for name in ("dense1", "dense2"):
        x = np.maximum(x @ p[f"{name}/kernel"] + p[f"{name}/bias"], 0)
    logits = x @ p["logits/kernel"] + p["logits/bias"]
    expected = Predictor(run, "cpu")(IMAGES).log_probabilities[0]
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("precision", "fields", "marks", "tolerance"),
    [
        ("float32", {"model": "cnn", "hidden_sizes": (8,)}, "HIGHEST", 1e-3),
        ("tf32", {"model": "logistic"}, r"precision = \[HIGH,", 1e-5),
        ("bfloat16", {"model": "logistic"}, "xbf16>", 1e-2),
    ],
)
def test_the_program_has_the_precision_of_the_run(precision, fields, marks, tolerance, tmp_path):
    """It takes any number of images, and runs on all platforms."""
    run = untrained(tmp_path, precision=precision, **fields)
    export.export(run, "stablehlo", tmp_path / "x")
    program = loaded(tmp_path / "x")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert [str(aval) for aval in program.in_avals] == ["uint8[b,28,28,1]"]
    assert [str(aval) for aval in program.out_avals] == ["float32[b,10]"]
    assert re.search(marks, program.mlir_module())
    assert b".py" not in (tmp_path / "x").read_bytes()  # no path of this machine
    found, expected = (jit(function)(IMAGES) for function in (program.call, run.apply))
    np.testing.assert_allclose(found, np.exp(expected), rtol=tolerance)


def test_a_program_needs_a_model_for_any_number_of_images(tmp_path, monkeypatch):
    class Fixed(LogisticRegression):
        def __call__(self, x, *, train=False):
            return super().__call__(x.reshape((len(x), 28, 28, 1)))

    monkeypatch.setitem(MODELS, "fixed", Fixed)
    with pytest.raises(UsageError, match=r"write x.shape\[0\] in place of len\(x\)"):
        export.export(untrained(tmp_path, model="fixed"), "stablehlo", tmp_path / "x")


def test_both_formats_reproduce_the_accuracy_of_the_run(config, tmp_path, split, command):
    fields = {"model": "mlp", "hidden_sizes": (16,), "normalize": False, "ema_decay": 0.9}
    record = fit(config(**fields)).record
    for file_format in ("safetensors", "stablehlo"):  # the second replaces the first
        words = f"--format={file_format}", f"--output={tmp_path / 'x'}"
        status, out, err = command("export", tmp_path / "run", *words)
        assert (status, err) == (0, "")
        assert out.endswith(f"test accuracy {100 * record['test_accuracy']:.2f} %\n")
        found = json.loads((tmp_path / "x.json").read_text())
        assert (found["version"], found["format"], found["seed"]) == (1, file_format, 1234)
        assert found["test_accuracy"] == record["test_accuracy"]
        assert found["classes"] == list("0123456789")
        assert str(tmp_path) not in json.dumps(found)
        if file_format == "safetensors":
            arrays = safetensors.numpy.load_file(tmp_path / "x")
            x = split.image.reshape(360, -1) @ arrays["dense1/kernel"] + arrays["dense1/bias"]
            x = np.maximum(x, 0)
            predicted = np.argmax(x @ arrays["logits/kernel"] + arrays["logits/bias"], 1)
        else:
            predicted = np.argmax(loaded(tmp_path / "x").call(split.image), 1)
        assert int(np.sum(predicted == split.label)) == record["test_correct"]


def test_one_of_many_seeds_is_chosen_if_it_is_finite(copied, edit_params, command):
    folder = copied("many")
    record = json.loads((folder / "result.json").read_text())
    status, _, err = command("export", folder)
    choice = "error: the networks are 0 (seed 1234) to 2 (seed 1236); choose"
    assert (status, choice in err) == (2, True)
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
