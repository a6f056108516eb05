"""`python -m mnist_jax export`: what another program gets is the model that was evaluated."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax import export as jax_export

from mnist_jax import Config, __main__, fit, load_dataset, steps
from mnist_jax import atomic_io as storage
from mnist_jax.inference import export
from mnist_jax.inference import restore as saved
from mnist_jax.models import MODELS, init_params
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs.progress import Progress

PAGE = (Path(__file__).parents[1] / "docs" / "running.md").read_text()
LOADING = next(c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "deserial" in c)


def untrained(folder: Path, **fields) -> saved.LoadedRun:
    config = Config(workdir=folder, **fields)
    dtype = jax.numpy.bfloat16 if config.precision == "bfloat16" else None
    model = MODELS[config.model](dtype=dtype, **config.model_options())
    init = jax.jit(partial(init_params, model))  # else each of its operations is compiled
    params = jax.device_get(init(jax.random.key(3)))
    return saved.LoadedRun(folder, config, model, Progress(steps.TrainState(0, params, ())), [])


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28, 1), np.uint8)


def loaded(file: Path) -> jax_export.Exported:
    return jax_export.deserialize(bytearray(file.read_bytes()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data_dir):
    """A run that keeps an average of its parameters, and one of two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    base = {"dataset": "digits", "data_dir": data_dir}
    one = {"model": "mlp", "hidden_sizes": (16,), "normalize": False, "ema_decay": 0.9}
    fit(Config(workdir=folder / "one", epochs=3, **base, **one))
    fit(Config(workdir=folder / "many", epochs=1, model="logistic", seeds=2, seed=5, **base))
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def test_the_readme_s_script_runs_the_cnn_without_this_package(tmp_path):
    run = untrained(tmp_path, model="cnn", hidden_sizes=(8,))
    found = export.export(run, "stablehlo", tmp_path / "model.stablehlo")
    seen = {count: images(count) for count in (1, 7)}
    np.savez(tmp_path / "images.npz", **{str(count): image for count, image in seen.items()})
    without = "import sys; sys.modules.update(mnist_jax=None, flax=None, optax=None)\n"
    compare = """
given = np.load("images.npz")
np.savez("found.npz", **{count: jax.jit(probabilities)(given[count]) for count in given})
"""
    (tmp_path / "script.py").write_text(without + LOADING + compare)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    probabilities = np.load(tmp_path / "found.npz")
    with devices.running_on("cpu", "float32") as device:
        classifier = saved.Classifier(run, device, batch_size=7)
        for count, image in seen.items():
            expected = classifier(image)[0]
            assert probabilities[str(count)].shape == (count, 10)
            np.testing.assert_allclose(probabilities[str(count)], expected, rtol=1e-4, atol=1e-6)
    assert found["sha256"] == hashlib.sha256((tmp_path / found["file"]).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("precision", "marks", "tolerance"),
    [
        ("float32", "HIGHEST", 1e-5),
        ("tf32", r"precision = \[HIGH,", 1e-5),
        ("bfloat16", "xbf16>", 1e-2),
    ],
)
def test_the_program_multiplies_as_the_run_did(precision, marks, tolerance, tmp_path):
    run = untrained(tmp_path, model="mlp", precision=precision)
    export.export(run, "stablehlo", tmp_path / "x")
    program = loaded(tmp_path / "x")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert re.search(marks, program.mlir_module())
    with devices.running_on("cpu", precision) as device:
        expected = saved.Classifier(run, device)(images(7))[0]
    found = jax.jit(program.call)(images(7))
    np.testing.assert_allclose(found, expected, rtol=tolerance)


def test_the_program_names_no_path_of_the_machine_it_was_made_on(tmp_path):
    export.export(untrained(tmp_path, model="logistic"), "stablehlo", tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    assert b".py" not in data
    assert jax.config.jax_traceback_in_locations_limit != 0  # as it was before


def test_both_files_hold_what_the_run_evaluated(folders, data_dir, tmp_path, capsys):
    """The average, of images that are not scaled: the accuracy comes out again."""
    folder, record = folders / "one", json.loads((folders / "one" / "result.json").read_text())
    for file_format in export.FORMATS:
        words = [f"--workdir={folder}", f"--format={file_format}", f"--output={tmp_path / 'x'}"]
        assert __main__.main(["export", *words]) == 0  # the second time in the first one's place
        shown = capsys.readouterr()
        assert shown.out.endswith(f"test accuracy {100 * record['test_accuracy']:.2f} %\n")
        assert shown.err == ""
        found = json.loads((tmp_path / "x.json").read_text())
        assert (found["version"], found["format"], found["seed"]) == (1, file_format, 1234)
        assert found["test_correct"] == record["test_correct"]
        assert ("as they are" in found["input"]["content"]) == (file_format == "safetensors")
        assert found["classes"] == list("0123456789")
        assert str(data_dir) not in json.dumps(found)
        test = load_dataset("digits", data_dir=data_dir).test
        if file_format == "safetensors":
            arrays = safetensors.numpy.load_file(tmp_path / "x")
            assert sum(array.size for array in arrays.values()) == found["parameters"]
            layers = [[arrays[f"{n}/kernel"], arrays[f"{n}/bias"]] for n in ("dense1", "logits")]
            (w1, b1), (w2, b2) = layers
            x = test.image.reshape(len(test.image), -1).astype(np.float32)
            predicted = np.argmax(np.maximum(x @ w1 + b1, 0) @ w2 + b2, 1)
        else:
            predicted = np.argmax(loaded(tmp_path / "x").call(test.image), 1)
        assert int(np.sum(predicted == test.label)) == record["test_correct"]


def test_of_many_seeds_one_is_named(copied, capsys):
    folder = copied("many")
    assert __main__.main(["export", f"--workdir={folder}"]) == 2
    assert "holds 2 networks, of the seeds 5 to 6; name one" in capsys.readouterr().err
    assert __main__.main(["export", f"--workdir={folder}", "--member=6"]) == 0
    found = json.loads((folder / "model.safetensors.json").read_text())
    record = json.loads((folder / "result.json").read_text())
    assert (found["seed"], found["test_correct"]) == (6, record["test_correct"][1])
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    expected = saved.load_run(folder).members[1]["logits"]["kernel"]
    np.testing.assert_array_equal(arrays["logits/kernel"], expected)


def forge(folder: Path) -> None:
    """As by a checkpoint of other parameters."""
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**record, "params_sha256": "0"}))
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    digests = storage.digest_lines({name: (folder / name).read_bytes() for name in names})
    (folder / "manifest.sha256").write_bytes(digests)


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        (lambda folder: (folder / "result.json").unlink(), "is not complete: it stands at step 45"),
        (forge, "is of other parameters; it is left out"),
    ],
)
def test_an_accuracy_that_is_not_this_model_s_is_left_out(copied, capsys, change, notice):
    folder = copied("one")
    change(folder)
    assert __main__.main(["export", f"--workdir={folder}"]) == 0
    shown = capsys.readouterr()
    assert notice in shown.err
    assert shown.out.endswith("test accuracy not known\n")
    assert json.loads((folder / "model.safetensors.json").read_text())["test_accuracy"] is None


def broken_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoints/*.safetensors"):
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "words", "status", "message"),
    [
        (None, ["--workdir=nowhere"], 2, "nowhere holds no run"),
        (None, None, 2, "--workdir is missing"),
        (None, ["--format=stablehol"], 2, "did you mean stablehlo"),
        (None, ["--member=7"], 2, "member is 7; allowed is 1234, the run's seed"),
        (None, ["--output={run}/config.json"], 2, "config.json.json is there and was not exported"),
        (None, ["--output={run}/config"], 2, "config.json is there and was not exported"),
        (None, ["--output={run}"], 2, "is there and was not exported"),
        (None, ["--output=/"], 2, "is there and was not exported"),
        (None, ["--output={run}/config.json/x"], 6, "Not a directory"),
        (None, ["--output={run}/nowhere/x"], 6, "No such file or directory"),
        (None, ["--output=" + "x" * 300], 6, "File name too long"),
        (broken_checkpoints, [], 4, "cannot be used"),
        (lambda f: shutil.rmtree(f / "checkpoints"), [], 4, "holds no checkpoint"),
        (lambda f: (f / "result.json").write_text("{}"), [], 4, "the result is damaged"),
    ],
)
def test_a_mistake_is_answered_in_one_line(copied, capsys, change, words, status, message):
    folder = copied("one")
    if change:
        change(folder)
    before = sorted(folder.rglob("*"))
    if words is not None:  # of a flag that is given again the last one counts
        words = [f"--workdir={folder}", *(word.format(run=folder) for word in words)]
    assert __main__.main(["export", *(words or [])]) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_model_that_is_not_finite_is_not_exported(tmp_path):
    run = untrained(tmp_path, model="logistic")
    run.progress.state.params["logits"]["bias"] = np.full(10, np.nan, np.float32)
    with pytest.raises(export.NonFiniteError, match="seed 1234"):
        export.export(run, "safetensors", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_leaves_the_old_file_and_a_way_on(tmp_path, monkeypatch):
    run, output = untrained(tmp_path, model="logistic"), tmp_path / "x"
    export.export(run, "safetensors", output)
    old, write, written = output.read_bytes(), storage.write_atomically, []

    def full(path, data):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, data)

    with monkeypatch.context() as patched, pytest.raises(export.DeviceError, match="No space"):
        patched.setattr(storage, "write_atomically", full)
        export.export(run, "stablehlo", output)
    assert output.read_bytes() == old
    export.export(run, "stablehlo", output)
    assert output.read_bytes() != old
