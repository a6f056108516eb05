"""`predict`, as a function and as a command: answers to people's pictures."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shared import ROOT

from mnist_jax import Callback, Config, evaluate, fit, load_dataset, predict
from mnist_jax.errors import DataError, NonFiniteError, UsageError
from mnist_jax.inference.preprocess import read_digit
from mnist_jax.inference.restore import Predictor, load_run


def test_a_folder_is_answered_in_aligned_lines(runs, pictures, command):
    status, out, err = command("predict", runs / "one", pictures[0].parent)
    pattern = r"(\d) +([\d.]+) %  (\d) +([\d.]+) %  .*/(\d\d) is (\d)\.png"
    found = [re.fullmatch(pattern, line) for line in out.splitlines()]
    assert (status, err, len(found)) == (0, "", 36)
    assert len({match.start(5) for match in found}) == 1
    assert [int(match[5]) for match in found] == list(range(36))
    assert sum(match[1] == match[6] for match in found) >= 25
    assert all(float(match[2]) >= float(match[4]) for match in found)


def test_without_a_run_the_network_of_the_package_answers(pictures, command):
    status, out, err = command("predict", *pictures)
    lines = out.splitlines()
    right = [line[0] == path.stem[-1] for line, path in zip(lines, pictures, strict=True)]
    assert (status, err.count("\n"), "the MLP that comes with mnist_jax" in err) == (0, 1, True)
    assert sum(right) >= 25
    assert command("predict", ROOT / "docs/figures/digit.png", "--device=CPU")[1].startswith("5 ")


def test_json_agrees_with_the_function_and_batches_with_single_pictures(runs, pictures, command):
    status, out, _ = command("predict", "--json", runs / "one", *pictures[:11])
    answers, found = map(json.loads, out.splitlines()), predict(runs / "one", pictures[:11])
    assert (status, found.shape, found.dtype) == (0, (11, 10), np.float32)
    for path, answer, expected in zip(pictures[:11], answers, found, strict=True):
        label, probabilities = int(expected.argmax()), answer.pop("probabilities")
        about = {"file": str(path), "label": label, "name": str(label), "warning": ""}
        assert answer == {**about, "probability": probabilities[label]}
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    for one in (pictures[0], str(pictures[0])):
        np.testing.assert_allclose(predict(runs / "one", one), found[:1], atol=1e-6)
    array = jnp.asarray(read_digit(pictures[0]).image[None])
    np.testing.assert_allclose(predict(load_run(runs / "one"), array), found[:1], atol=1e-6)


def test_an_ensemble_is_the_mean_of_finite_members(runs, copied, edit_params, pictures, command):
    image = read_digit(pictures[0]).image[None]
    members = np.exp(Predictor(load_run(runs / "many"))(image).log_probabilities)
    assert len(members) == 3
    np.testing.assert_allclose(predict(runs / "many", pictures[0]), members.mean(0), atol=1e-6)
    with pytest.raises(UsageError, match="the images are bool; allowed are uint8 and floats"):
        load_run(runs / "many").apply(image > 0)
    voted = np.exp(load_run(runs / "many").apply(image))
    np.testing.assert_allclose(voted, members.mean(0), atol=1e-6)
    folder = copied("many")
    edit_params(folder, lambda name, array: array[1].ravel().__setitem__(0, np.nan))
    status, out, err = command("predict", folder, *pictures, "--json")
    assert (status, err) == (0, f"warning: seed 1235 of {folder} is not finite; it is excluded\n")
    found = json.loads(out.splitlines()[0])["probabilities"]
    np.testing.assert_allclose(found, members[[0, 2]].mean(0)[0], atol=1e-6)
    assert all(err in command(name, folder, runs / "worse")[2] for name in ("compare", "ensemble"))
    evaluated = evaluate(folder)
    assert [member["seed"] for member in evaluated["members"]] == [1234, 1236]
    assert evaluated["warnings"] == [err.strip().removeprefix("warning: ")]
    edit_params(folder, lambda name, array: array.fill(np.nan))
    status, _, err = command("predict", folder, *pictures)
    assert (status, err.count("\n")) == (5, 1)
    with pytest.raises(NonFiniteError, match=r"seed 1234 of .* is not finite"):
        load_run(folder).apply(image)


def test_the_warnings_of_the_training_are_shown(config, pictures, command):
    folder = fit(config(precision="bfloat16", max_steps=1), callbacks=[mock.Mock(Callback)]).workdir
    status, _, err = command("predict", folder, *pictures[:2])
    assert (status, err.count("\n")) == (0, 1) and "trained: bfloat16 on" in err


def test_classes_have_the_names_of_the_run_s_data_set(copied, pictures, command):
    config = (folder := copied("one")) / "config.json"
    values = json.loads(config.read_text())
    values["data"]["class_names"] = ["Bag", "Coat", *"abcdefgh"]
    config.write_text(json.dumps(values))
    status, out, _ = command("predict", folder, pictures[9])
    assert status == 0
    assert {"Bag ", "Coat", *"abcdefgh"} & set(out.split("  "))


def test_bad_files_get_lines_and_the_others_answers(runs, pictures, tmp_path, command, monkeypatch):
    (tmp_path / "bad" / "folder.png").mkdir(parents=True)
    folder, good = tmp_path / "bad", pictures[0]
    copies = "zero.JPG a.jfif b.tif c .hidden.png notes.txt folder.png/x.png"
    for name in copies.split():
        shutil.copy(good, folder / name)
    Image.new("L", (100, 100), 230).save(folder / "blank.png")
    (folder / "cut.jpeg").write_bytes(good.read_bytes()[:200])
    (folder / "d.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    os.mkfifo(folder / "pipe.png")
    for name in ("new\nline\x1b[2J.png", "readme.md"):
        (folder / name).write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "none").mkdir()
    words = (runs / "one", "~/bad", "nowhere.png", folder / "notes.txt", tmp_path / "none")
    status, out, err = command("predict", *words)
    assert status == 3
    names = ["a.jfif", "b.tif", "zero.JPG", "notes.txt"]
    assert [line.rpartition("/")[2] for line in out.splitlines()] == names
    reasons = (
        "blank.png: no digit found",
        "cut.jpeg cannot be decoded",
        "d.HEIC is not a picture",
        r"new\nline\x1b[2J.png is not a picture",
        "nowhere.png: No such file",
        "none is a folder without pictures; allowed are PNG",
        "pictures without an answer: 6 of 10; the lines above say why",
    )
    for line, reason in zip(err.splitlines(), reasons, strict=True):
        assert line.startswith("error: ") and reason in line and line.isprintable()
    status, out, _ = command("predict", *words, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (status, len(answers)) == (3, 10)
    assert sum(answer.keys() == {"file", "error"} for answer in answers) == 6
    with pytest.raises(DataError, match=r"blank.png: no digit found"):
        predict(runs / "one", folder)
    for images in ([], np.zeros((2, 28, 28), np.uint8), np.zeros((2, 28, 28, 1))):
        with pytest.raises(UsageError, match=r"takes uint8 0 to 255, \(n, 28, 28, 1\) with n of 1"):
            predict(runs / "one", images)


def test_the_preprocessed_images_are_saved(runs, pictures, tmp_path, command):
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / pictures[0].name
    Image.fromarray(np.hstack([Image.open(path) for path in pictures[:2]])).save(again)
    folder = tmp_path / "a" / "seen"
    words = (runs / "one", pictures[0], again.parent, f"--save_preprocessed={folder}")
    status, _, err = command("predict", *words)
    assert (status, err.count("warning: "), "hold 2 digits" in err) == (0, 1, True)
    names = [f"0001-{pictures[0].name}", f"0002-{pictures[0].name}"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, path in zip(names, (pictures[0], again), strict=True):
        assert (np.asarray(Image.open(folder / name)) == read_digit(path).image[..., 0]).all()


def pictured(image: np.ndarray, rng: np.random.Generator, largest: int, path: Path) -> Path:
    """Saves a digit as a person's picture might show it, at random; the name ends in the format."""
    times = float(np.exp(rng.uniform(np.log(0.5), np.log(largest))))
    side = round(28 * times)
    smooth = Image.Resampling.BICUBIC if times > 1 else Image.Resampling.HAMMING
    ink = Image.fromarray(image.astype(np.float32)).resize((side, side), smooth)
    ink = np.asarray(ink.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)) / 255
    height, width = rng.integers(side, 2 * side + 1, 2)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    ink = np.pad(ink, ((top, height - side - top), (left, width - side - left))).clip(0, 1)
    paper, pen = (230, 30) if rng.random() < 0.7 else (40, 220)
    light = 1 - rng.uniform(0, 0.5) * np.linspace(0, 1, width)
    levels = ((paper + (pen - paper) * ink) * light).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(levels)
    form = rng.choice(["jpg", "webp", "coloured.png", "transparent.png", "palette.png"])
    if form == "coloured.png":
        picture = Image.fromarray((levels[..., None] * rng.uniform(0.7, 1, 3)).astype(np.uint8))
    elif form == "transparent.png":
        picture = Image.new("RGBA", (width, height), (20, 30, 90, 0))
        picture.putalpha(Image.fromarray((ink * 255).astype(np.uint8)))
    elif form == "palette.png":
        picture = picture.convert("RGB").quantize(16)
    path = path.with_name(f"{path.name}.{form}")
    picture.save(path, quality=int(rng.integers(30, 95)))  # PNG ignores it
    return path


@pytest.mark.mnist
@pytest.mark.parametrize("largest", [8, pytest.param(20, marks=pytest.mark.campaign)])
def test_pictures_are_answered_as_well_as_mnist_s_images(mnist_dir, data_dir, tmp_path, largest):
    where = {"manual_dir": mnist_dir, "data_dir": data_dir}
    config = Config(model="mlp", dataset="mnist", epochs=1, workdir=tmp_path / "run", **where)
    workdir, rng = fit(config).workdir, np.random.default_rng(0)
    test = load_dataset("mnist", **where).test
    places = rng.permutation(10_000)[:400]
    label = test.label[places]
    untouched = np.mean(predict(workdir, test.image[places]).argmax(1) == label)
    paths = [pictured(test.image[i, ..., 0], rng, largest, tmp_path / f"{i:04d}") for i in places]
    right = predict(workdir, paths).argmax(1) == label
    assert untouched > 0.93
    assert right.mean() > untouched - 0.02
    forms = np.array([path.name[5:] for path in paths])
    for form in set(forms):
        assert right[forms == form].mean() > untouched - 0.06, form
