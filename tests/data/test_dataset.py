"""Data of the user's own: arrays, .npz files and IDX folders, what is refused; held-out images."""

import os
import re
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from mnist_jax import MODELS, OPTIMIZERS, Config, Dataset, cli, fit, load_dataset
from mnist_jax.data.dataset import Split, hold_out
from mnist_jax.errors import DataError, printable
from mnist_jax.models import LogisticRegression

rng = np.random.default_rng(0)
X, Y = rng.integers(0, 256, (47, 32, 32, 3), np.uint8), np.arange(47)
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:5], "y_test": Y[:5]}
GREY = X[..., 0], Y, X[:5, ..., 0], Y[:5]


def write_idx(folder, ending=""):
    return small.write_idx(folder, GREY, "letters-", ending)


@pytest.mark.parametrize(("classes", "count"), [((), 47), (list("a" * 50), 50), (range(50), 50)])
def test_arrays_decide_shape_and_classes(classes, count):
    data = Dataset.from_arrays("mine", *GOOD.values(), class_names=classes)
    assert (data.spec.image_shape, data.spec.num_classes) == ((32, 32, 3), count)
    assert all(isinstance(name, str) for name in data.class_names)
    assert (data.train.image.dtype, data.train.label.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(data.train.image, X)
    assert not any(array.flags.writeable for array in (*data.train, *data.test))
    assert not data.warnings and Dataset.from_arrays("a", X, Y + 1, X, Y + 1).warnings


def test_floats_from_0_to_1_and_grey_images_are_pixels():
    grey = X[..., 0]
    data = Dataset.from_arrays("mine", grey / 255, Y[:, None], grey.astype(np.int64), list(Y))
    for split in data.train, data.test:
        np.testing.assert_array_equal(split.image, grey[..., None])
        np.testing.assert_array_equal(split.label, Y)


@pytest.mark.parametrize("kind", ["npz", "idx", "idx.gz"])
def test_files_are_read_as_the_arrays(tmp_path, kind):
    path = tmp_path / ("my.data.npz" if kind == "npz" else "my.data")
    if kind == "npz":
        np.savez(path, **dict(zip(GOOD, GREY, strict=True)))
    else:
        write_idx(path)
        if kind == "idx.gz":  # both are there, as torchvision leaves them
            write_idx(path, ".gz")
    data = load_dataset(str(path))
    other = Dataset.from_arrays("mine", *GREY[:3], GREY[3][::-1])
    assert data.sha256 == Dataset.from_arrays("mine", *GREY).sha256 != other.sha256
    assert (data.name, data.source) == ("my.data", str(path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_train": Y[:-1]}, r"training labels are int64\[46\]; allowed .* \(47,\)"),
        ({"y_test": Y[:4]}, r"test labels are int64\[4\]; allowed .* \(5,\)"),
        ({"y_train": Y + 0.0}, "training labels are float64"),
        ({"y_train": Y - 1}, "training labels are from -1 to 45; .* from 0"),
        ({"y_train": Y + 2**30}, "mine: a label is 1073741870, .* 0 to 99999"),
        ({"y_test": Y[:5] + 43}, "mine: a label is 47, and there are 47 classes: .* 0 to 46"),
        ({"class_names": ("a", "b")}, "mine: a label is 46, and there are 2 classes"),
        ({"class_names": {*range(47)}}, "mine: class_names is a set, which has no order; pass"),
        ({"x_train": X / 128}, "training images are float64 from 0.0 to 1.99.*; .* 0 to 1"),
        ({"x_test": np.full((5, 32, 32, 3), np.nan)}, "test images are float64 from nan"),
        ({"x_train": X.astype(int) * 2}, "images are int64 from 0 to 510; allowed are whole"),
        ({"x_train": (X > 127).astype(int)}, "images are int64 from 0 to 1; .* floats or bools"),
        ({"x_train": X[:, 0, 0]}, r"training images are uint8\[47, 3\]; .* \(n, height, width"),
        ({"x_train": X[:0], "y_train": Y[:0]}, r"training images are uint8\[0, 32, 32, 3\]"),
        ({"x_train": np.moveaxis(X, -1, 1)}, "channels come last: pass np.moveaxis"),
        ({"name": "a/mine"}, "the name 'a/mine' looks like a path; choose another"),
        ({"x_test": X[:5, :28]}, r"images differ in shape: \(32, 32, 3\) and \(28, 32, 3\)"),
        ({"x_train": [*X[:-1], X[-1, :28]]}, "training images or labels differ in shape"),
        ({"x_train": np.array([*X[:-1], None], object)}, "training images are object"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(changed, message):
    with pytest.raises(DataError, match=message) as error:
        Dataset.from_arrays(**{"name": "mine", **GOOD, **changed})
    assert printable(str(error.value)) == str(error.value)  # one line


def npz(**arrays):
    return lambda path: np.savez(path.with_suffix(".npz"), **arrays)


def one_array(path):
    with path.with_suffix(".npz").open("wb") as file:
        np.save(file, X)


def damaged_npz(path):
    np.savez(path.with_suffix(".npz"), **GOOD)
    data = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(data.replace(b"}", b"(", 1))


def twice(path):
    for file in write_idx(path):
        shutil.copy(file, path / f"more-{file.name}")


PICKLED = np.array([{"a": 1}] * 47, object)
FILES = {
    "absent": (lambda path: None, "cannot read .*: No such file"),
    "text": (lambda path: path.with_suffix(".npz").write_text("hello"), "not an .npz file"),
    "one array": (one_array, "not an .npz file"),
    "other names": (npz(images=X, y_train=Y), "no x_train, x_test, y_test; it has images, y_train"),
    "no arrays": (npz(), "no x_train.*; it has nothing"),
    "pickled": (npz(**GOOD | {"x_train": PICKLED}), "not an .npz file of plain arrays"),
    "damaged": (damaged_npz, "not an .npz file of plain arrays"),
    "labels": (npz(**GOOD | {"y_train": Y - 1}), "training labels are from -1"),
    "empty folder": (lambda path: path.mkdir(), "has 0 files named train…images-idx3-ubyte"),
    "three files": (lambda path: write_idx(path)[3].unlink(), "0 files named test…labels-idx1"),
    "eight files": (twice, "has 2 files named train…images-idx3-ubyte"),
    "cut file": (lambda path: os.truncate(write_idx(path)[0], 1000), "ubyte is not an IDX file"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_data_set_end_a_run_in_one_line(tmp_path, capsys, name):
    make, message = FILES[name]
    make(tmp_path / "mine")
    [path] = list(tmp_path.iterdir()) or [tmp_path / "mine.npz"]
    config = Config(model="logistic", dataset=str(path), workdir=tmp_path / "run")
    assert cli.exit_status(lambda: fit(config), debug=False) == 3
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


class Part(LogisticRegression):
    def __call__(self, x, *, train=False):
        return super().__call__(x)[:, :5]


class Fieldless(nn.Module):
    num_classes: int = 10


class Failing(LogisticRegression):
    def __call__(self, x, *, train=False):
        return x @ jnp.zeros((3, 3))


class Forgetful(LogisticRegression):
    """A part of its state exists in training only."""

    @nn.compact
    def __call__(self, x, *, train=False):
        self.variable("counts", "all", jnp.zeros, ())
        if train:
            self.variable("counts", "train", jnp.zeros, ())
        return super().__call__(x)


class Half(LogisticRegression):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(10, param_dtype=jnp.bfloat16)(x.reshape((len(x), -1)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Half, "'odd' has arrays of bfloat16, which no checkpoint can hold; keep them"),
        (Part, r"'odd' returns shape \(2, 5\) for two images; logits have shape \(2, 10\)"),
        (Fieldless, "'odd' has no field dtype, image_shape; add"),
        (Failing, "'odd' on images .28, 28, 1. fails: TypeError: dot_general"),
        (Forgetful, "'odd' changes the structure of its state in training"),
    ],
)
def test_a_model_that_cannot_be_trained_gets_one_line(config, monkeypatch, capsys, model, message):
    monkeypatch.setitem(MODELS, "odd", model)
    run = config(model="odd")
    assert cli.exit_status(lambda: fit(run), debug=False) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(f"error: the model {message}", line), line
    assert not run.workdir.exists()


def test_the_state_of_another_optimizer_is_refused(config, monkeypatch, capsys):
    """A name registered in Python can mean another optimizer when the run is resumed."""
    monkeypatch.setitem(OPTIMIZERS, "mine", optax.sgd)
    fit(run := config(optimizer="mine", max_steps=3))
    (run.workdir / "result.json").unlink()  # as if it had been interrupted
    monkeypatch.setitem(OPTIMIZERS, "mine", optax.adam)
    before = {path: path.read_bytes() for path in run.workdir.rglob("*.*") if path.is_file()}
    assert cli.exit_status(lambda: fit(run), debug=False) == 4
    [line] = capsys.readouterr().err.splitlines()
    assert re.search("no array state/opt_state/.*--init_from=", line), line
    assert before == {p: p.read_bytes() for p in run.workdir.rglob("*.*") if p.is_file()}


@pytest.mark.parametrize("count", [1, 50, 120, 199])
def test_each_class_gives_its_share_and_every_image_is_in_one_place(count):
    counts = np.array([100, 60, 40])
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    image = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(28, 1).repeat(28, 2)
    split = Split(image, label.astype(np.int32))
    rest, held_out = hold_out(split, count)
    assert len(held_out.label) == count
    shares = np.bincount(held_out.label, minlength=3) - count * counts / 200
    assert np.abs(shares).max() <= 1
    together = np.concatenate([rest.image, held_out.image])[:, 0, 0, 0]
    assert sorted(together.tolist()) == list(range(200))
    for part in (rest, held_out):
        places = part.image[:, 0, 0, 0].astype(int)
        assert (np.diff(places) > 0).all()
        np.testing.assert_array_equal(part.label, split.label[places])
    np.testing.assert_array_equal(hold_out(split, count)[1].image, held_out.image)  # as before
