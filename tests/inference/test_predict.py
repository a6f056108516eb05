"""`predict`, as a function and as a command: answers to people's pictures."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_jax import Config, fit, load_dataset, predict
from mnist_jax.errors import DataError, UsageError
from mnist_jax.inference.preprocess import read_digit
from mnist_jax.inference.restore import Predictor, load_run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, data_dir) -> list[Path]:
    """Pictures of digits in one folder, named after what they show: black on white, 84 × 84."""
    folder = tmp_path_factory.mktemp("pictures")
    split, paths = load_dataset("digits", data_dir=data_dir).test, []
    for place, (image, label) in enumerate(zip(split.image[:36], split.label[:36], strict=True)):
        paths.append(folder / f"{place:02d} is {label}.png")
        Image.fromarray(255 - image[..., 0]).resize((84, 84)).save(paths[-1])
    return paths


def test_a_folder_is_answered_in_aligned_lines(runs, pictures, command):
    status, out, err = command("predict", runs / "one", pictures[0].parent)
    pattern = r"(\d) +([\d.]+) %  (\d) +([\d.]+) %  .*/(\d\d) is (\d)\.png"
    found = [re.fullmatch(pattern, line) for line in out.splitlines()]
    assert (status, err, len(found)) == (0, "", 36)
    assert len({match.start(5) for match in found}) == 1
    assert [int(match[5]) for match in found] == list(range(36))
    assert sum(match[1] == match[6] for match in found) >= 25
    assert all(float(match[2]) >= float(match[4]) for match in found)


def test_json_agrees_with_the_function_and_its_batches_with_single_pictures(
    runs, pictures, command
):
    status, out, _ = command("predict", "--json", runs / "one", *pictures[:11])
    answers = [json.loads(line) for line in out.splitlines()]
    assert (status, [answer["file"] for answer in answers]) == (0, list(map(str, pictures[:11])))
    found = predict(runs / "one", pictures[:11])
    assert (found.shape, found.dtype) == ((11, 10), np.float32)
    for answer, probabilities in zip(answers, found, strict=True):
        assert answer.keys() == {"file", "label", "name", "probability", "probabilities"}
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-6)
        assert answer["label"] == probabilities.argmax()
        assert answer["name"] == str(answer["label"])
        assert answer["probability"] == answer["probabilities"][answer["label"]]
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    for one in (pictures[0], str(pictures[0])):
        np.testing.assert_allclose(predict(runs / "one", one), found[:1], atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [[], np.zeros((2, 28, 28), np.uint8), np.zeros((2, 28, 28, 1))],
    ids=["empty", "shape", "dtype"],
)
def test_other_arrays_are_refused(runs, images):
    with pytest.raises(UsageError, match=r"allowed are paths of pictures, or an array"):
        predict(runs / "one", images)


def test_an_ensemble_answers_with_the_mean_of_its_finite_members(
    runs, copied, edit_params, pictures, command
):
    image = read_digit(pictures[0]).image[None]
    members = np.exp(Predictor(load_run(runs / "many"))(image).log_probabilities)
    assert len(members) == 3
    np.testing.assert_allclose(predict(runs / "many", pictures[0]), members.mean(0), atol=1e-6)

    folder = copied("many")
    edit_params(folder, lambda name, array: array.__setitem__(1, np.nan))
    status, out, err = command("predict", folder, *pictures, "--json")
    assert (status, err) == (0, f"warning: seed 1235 of {folder} is not finite; it is excluded\n")
    found = json.loads(out.splitlines()[0])["probabilities"]
    np.testing.assert_allclose(found, members[[0, 2]].mean(0)[0], atol=1e-6)
    edit_params(folder, lambda name, array: array.fill(np.nan))
    status, _, err = command("predict", folder, *pictures)
    assert (status, err.count("\n")) == (5, 1)


def test_several_digits_in_a_picture_give_a_warning(runs, pictures, tmp_path, command):
    both = [np.asarray(Image.open(path)) for path in pictures[:2]]
    Image.fromarray(np.concatenate(both, axis=1)).save(two := tmp_path / "two.png")
    status, _, err = command("predict", runs / "one", two)
    assert (status, err) == (
        0,
        f"warning: {two} seems to hold 2 digits; the largest is used\n",
    )


def test_classes_have_the_names_of_the_run_s_data_set(copied, pictures, command):
    config = (folder := copied("one")) / "config.json"
    values = json.loads(config.read_text())
    values["data"]["class_names"] = ["Bag", "Coat", *"abcdefgh"]
    config.write_text(json.dumps(values))
    status, out, _ = command("predict", folder, pictures[9])
    assert status == 0
    assert {"Bag ", "Coat", *"abcdefgh"} & set(out.split("  "))


# Bad input


def test_bad_files_get_one_line_each_and_the_others_are_answered(
    runs, pictures, tmp_path, command, monkeypatch
):
    (tmp_path / "bad" / "folder.png").mkdir(parents=True)
    folder, good = tmp_path / "bad", pictures[0]
    for name in ("zero.JPG", ".hidden.png", "notes.txt", "folder.png/x.png"):
        shutil.copy(good, folder / name)
    Image.new("L", (100, 100), 230).save(folder / "blank.png")
    (folder / "cut.jpeg").write_bytes(good.read_bytes()[:200])
    os.mkfifo(folder / "pipe.png")
    (folder / "new\nline\x1b[2J.png").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    words = (runs / "one", "~/bad", "nowhere.png", folder / "notes.txt")

    status, out, err = command("predict", *words)
    assert status == 3
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["zero.JPG", "notes.txt"]
    *lines, last = err.splitlines()
    assert last == "error: pictures without an answer: 5 of 7; the lines above say why"
    assert len(lines) == 5
    assert all(line.startswith("error: ") and line.isprintable() for line in lines)
    for reason in (
        "blank.png: no digit found",
        "cut.jpeg cannot be decoded",
        "pipe.png is not a file",
        r"new\nline\x1b[2J.png is not a picture",
        "nowhere.png: No such file",
    ):
        assert sum(reason in line for line in lines) == 1, reason

    status, out, _ = command("predict", *words, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (status, len(answers)) == (3, 7)
    assert sum(answer.keys() == {"file", "error"} for answer in answers) == 5

    with pytest.raises(DataError, match="no digit found"):
        predict(runs / "one", folder / "blank.png")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["RUN"], 2, "no picture is named"),
        (["nowhere", "PICTURE"], 2, "nowhere holds no run"),
        (["RUN", "RUN"], 3, "one holds no file that ends in .png, .jpg"),
        (["RUN", "PICTURE", "--platform=tpu"], 6, "no device for --platform=tpu"),
        (["RUN", "PICTURE", "--save_preprocessed=a\0b"], 2, "is not a path"),
        (["RUN", "PICTURE", "--save_preprocessed=RUN/config.json"], 6, "cannot write"),
    ],
)
def test_a_mistake_gets_one_line(words, status, message, runs, pictures, command):
    places = {"RUN": str(runs / "one"), "PICTURE": str(pictures[0])}
    words = [re.sub("RUN|PICTURE", lambda match: places[match[0]], word) for word in words]
    found, _, err = command("predict", *words)
    assert (found, err.count("\n")) == (status, 1)
    assert re.search(message, err), err


def test_the_preprocessed_images_are_saved(runs, pictures, tmp_path, command):
    (tmp_path / "again").mkdir()
    shutil.copy(pictures[1], tmp_path / "again" / pictures[0].name)
    folder = tmp_path / "a" / "seen"
    words = (runs / "one", pictures[0], tmp_path / "again", f"--save_preprocessed={folder}")
    assert command("predict", *words)[0] == 0
    names = [f"0001-{pictures[0].name}", f"0002-{pictures[0].name}"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, path in zip(names, pictures, strict=False):
        assert (np.asarray(Image.open(folder / name)) == read_digit(path).image[..., 0]).all()


# Accuracy


def pictured(image: np.ndarray, rng: np.random.Generator, path: Path) -> Path:
    """Saves a digit as a person's picture might show it, at random; the name ends in the format."""
    times = float(np.exp(rng.uniform(np.log(0.5), np.log(20))))
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
        tint = rng.uniform(0.7, 1, 3)
        picture = Image.fromarray((levels[..., None] * tint).astype(np.uint8))
    elif form == "transparent.png":
        picture = Image.new("RGBA", (width, height), (20, 30, 90, 0))
        picture.putalpha(Image.fromarray((ink * 255).astype(np.uint8)))
    elif form == "palette.png":
        picture = picture.convert("RGB").quantize(16)
    path = path.with_name(f"{path.name}.{form}")
    picture.save(path, quality=int(rng.integers(30, 95)))  # PNG ignores it
    return path


@pytest.mark.mnist
def test_pictures_are_answered_as_well_as_mnist_s_own_images(mnist_dir, data_dir, tmp_path):
    where = {"dataset": "mnist", "manual_dir": mnist_dir, "data_dir": data_dir}
    workdir = fit(Config(model="mlp", epochs=1, workdir=tmp_path / "run", **where)).workdir
    test = load_dataset("mnist", data_dir=data_dir, manual_dir=mnist_dir).test
    rng = np.random.default_rng(0)
    places = rng.permutation(10_000)[:400]
    label = test.label[places]
    untouched = np.mean(predict(workdir, test.image[places]).argmax(1) == label)
    paths = [pictured(test.image[i, ..., 0], rng, tmp_path / f"{i:04d}") for i in places]
    right = predict(workdir, paths).argmax(1) == label
    assert untouched > 0.93
    assert right.mean() > untouched - 0.02
    forms = np.array([path.name[5:] for path in paths])
    for form in set(forms):
        assert right[forms == form].mean() > untouched - 0.06, form
