"""`python -m mnist_jax predict`, and the function of that name: answers to people's pictures."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_jax import Config, __main__, fit, load_dataset, predict
from mnist_jax.commands import predict as command
from mnist_jax.errors import DataError, UsageError
from mnist_jax.inference import predict as prediction
from mnist_jax.inference import preprocess as images
from mnist_jax.inference import restore as saved
from mnist_jax.reporting import console as display

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir) -> Path:
    """A run of one seed and one of three."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seeds in (("one", None), ("many", 3)):
        where = {"dataset": "digits", "data_dir": data_dir, "workdir": folder / name}
        fit(Config(model="logistic", epochs=20, seeds=seeds, **where))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, data_dir) -> Path:
    """A folder of pictures of digits, named after what they show: black on white, 84 × 84."""
    folder = tmp_path_factory.mktemp("pictures")
    split = load_dataset("digits", data_dir=data_dir).test
    for place, (image, label) in enumerate(zip(split.image[:36], split.label[:36], strict=True)):
        picture = Image.fromarray(255 - image[..., 0]).resize((84, 84))
        picture.save(folder / f"{place:02d} is {label}.png")
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    status = __main__.main(["predict", *map(str, words)])
    return status, *capsys.readouterr()


def two_digits(pictures: Path, target: Path) -> Path:
    both = [np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())[:2]]
    Image.fromarray(np.concatenate(both, axis=1)).save(target)
    return target


# Answers


def test_a_folder_is_answered_in_aligned_lines(runs, pictures, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    status, out, err = run(capsys, "--workdir=~/one", pictures)
    lines = out.splitlines()
    assert (status, err, len(lines)) == (0, "", 36)
    assert len({len(line) for line in lines}) == 1
    pattern = r"(.*/(\d\d) is (\d)\.png)  (\d) +([\d.]+) %  (\d) +([\d.]+) %"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found)
    assert [int(match[2]) for match in found] == list(range(36))
    assert sum(match[3] == match[4] for match in found) >= 29
    assert all(float(match[5]) >= float(match[7]) for match in found)


def test_json_says_the_same_as_the_function(runs, pictures, capsys):
    paths = sorted(pictures.iterdir())[:3]
    status, out, _ = run(capsys, "--json", f"--workdir={runs / 'one'}", *paths)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [answer["file"] for answer in answers] == list(map(str, paths))
    found = predict(runs / "one", paths)
    assert (found.shape, found.dtype) == ((3, 10), np.float32)
    for answer, probabilities in zip(answers, found, strict=True):
        assert answer.keys() == {"file", "label", "name", "probability", "probabilities"}
        np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-6)
        assert answer["label"] == probabilities.argmax()
        assert answer["name"] == str(answer["label"])
        assert answer["probability"] == answer["probabilities"][answer["label"]]
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_more_pictures_than_a_batch_keep_their_order(runs, pictures, monkeypatch):
    paths = sorted(pictures.iterdir())
    expected = predict(runs / "one", paths)
    monkeypatch.setattr(prediction, "BATCH_SIZE", 5)
    np.testing.assert_allclose(predict(runs / "one", paths), expected, atol=1e-6)


def test_the_function_takes_images_of_a_data_set_as_they_are(runs, data_dir):
    test = load_dataset("digits", data_dir=data_dir).test
    record = json.loads((runs / "one" / "result.json").read_text())
    found = predict(runs / "one", test.image, platform="cpu")
    assert np.sum(found.argmax(1) == test.label) == record["test_correct"]


def test_one_file_needs_no_list(runs, pictures):
    path = min(pictures.iterdir())
    found = [predict(runs / "one", one) for one in (path, str(path), [path])]
    assert all((one == found[0]).all() and one.shape == (1, 10) for one in found)


@pytest.mark.parametrize(
    "wrong",
    [[], np.zeros((2, 28, 28), np.uint8), np.zeros((2, 28, 28, 1)), np.zeros((0, 28, 28, 1), "u1")],
    ids=str,
)
def test_the_function_refuses_what_are_no_images(runs, wrong):
    with pytest.raises(UsageError, match=r"allowed are one or more paths of pictures, or an array"):
        predict(runs / "one", wrong)


def test_members_answer_with_their_mean(runs, pictures):
    path = min(pictures.iterdir())
    run = saved.load_run(runs / "many")
    import jax

    members = saved.Classifier(run, jax.devices()[0])(images.read_digit(path).image[None])
    assert len(members) == 3
    np.testing.assert_allclose(predict(runs / "many", path), members.mean(0), atol=1e-6)


class Spoilt(saved.Classifier):
    """The members named are not finite."""

    members = (1,)

    def __call__(self, images):
        found = super().__call__(images)
        found[list(self.members)] = np.nan
        return found


def test_a_member_that_is_not_finite_is_left_out_with_a_notice(runs, pictures, monkeypatch, capsys):
    path = min(pictures.iterdir())
    monkeypatch.setattr(prediction, "Classifier", Spoilt)
    status, out, err = run(capsys, f"--workdir={runs / 'many'}", pictures, "--json")
    assert (status, "NaN" in out) == (0, False)
    assert err == f"notice: seed 1235 of {runs / 'many'} is not finite; it is left out\n"
    monkeypatch.setattr(Spoilt, "members", (0, 1, 2))
    status, _, err = run(capsys, f"--workdir={runs / 'many'}", path)
    assert (status, err.count("\n")) == (5, 1)
    assert err.endswith("no member is left\n")


def test_classes_have_the_names_of_the_run_s_data_set(runs, pictures, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"fashion_mnist"'))
    path = sorted(pictures.iterdir())[9]  # a 9, the ninth of its classes
    status, out, _ = run(capsys, f"--workdir={tmp_path / 'run'}", path)
    assert (status, "Ankle boot" in out) == (0, True)


def test_a_run_that_is_not_complete_is_noticed(runs, pictures, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    status, _, err = run(capsys, f"--workdir={tmp_path / 'cut'}", min(pictures.iterdir()))
    assert status == 0
    assert err == f"notice: {tmp_path / 'cut'} is not complete: it stands at step 300\n"


def test_several_digits_are_noticed_unless_that_is_meant(runs, pictures, tmp_path, capsys):
    path = two_digits(pictures, tmp_path / "two.png")
    words = (f"--workdir={runs / 'one'}", path)
    notice = f"notice: {path} seems to hold 2 digits; the largest is read\n"
    assert run(capsys, *words)[::2] == (0, notice)
    assert run(capsys, *words, "--largest")[::2] == (0, "")


# Bad input


def hostile(folder: Path, pictures: Path) -> dict[str, str]:
    """Makes files that have no answer; what is said of each."""
    good = min(pictures.iterdir()).read_bytes()
    (folder / "blank.png").parent.mkdir(exist_ok=True)
    Image.new("L", (100, 100), 230).save(folder / "blank.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.gif")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "cut.jpeg").write_bytes(good[: len(good) // 2])
    (folder / "letter.png").write_text("Dear all,")
    os.mkfifo(folder / "pipe.png")
    (folder / "new\nline\x1b[2J.png").write_bytes(b"")
    return {
        "blank.png": "blank.png: no digit found",
        "tiny.gif": "tiny.gif: no digit found",
        "bomb.png": "bomb.png is too large",
        "cut.jpeg": "cut.jpeg is damaged",
        "letter.png": "letter.png is no picture",
        "pipe.png": "pipe.png is not a file",
        "new\nline\x1b[2J.png": r"new\nline\x1b[2J.png is no picture",
    }


def test_bad_files_are_named_and_the_others_answered(runs, pictures, tmp_path, capsys):
    folder = tmp_path / "bad"
    folder.mkdir()
    reasons = hostile(folder, pictures)
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(min(pictures.iterdir()), folder / "good.txt")
    shutil.copy(min(pictures.iterdir()), folder / "zero.jpg")  # it is a PNG
    words = (f"--workdir={runs / 'one'}", folder, "nowhere.png", empty, folder / "good.txt")
    status, out, err = run(capsys, *words)
    lines = err.splitlines()
    assert (status, len(out.splitlines())) == (3, 2)
    assert len(lines) == len(reasons) + 3
    assert all(line.startswith("error: ") and line.isprintable() for line in lines)
    for reason in (*reasons.values(), "nowhere.png: No such file", "empty holds no picture"):
        assert sum(reason in line for line in lines) == 1, reason
    assert lines[-1] == f"error: {len(reasons) + 2} of 11 have no answer; the lines above say why"

    status, out, _ = run(capsys, *words, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (status, len(answers)) == (3, 11)
    bad = {Path(answer["file"]).name: answer for answer in answers if "error" in answer}
    assert bad.keys() == {*reasons, "nowhere.png", "empty"}
    assert all(answer.keys() == {"file", "error"} for answer in bad.values())

    with pytest.raises(DataError, match="no digit found"):
        predict(runs / "one", folder / "blank.png")


def make_unreadable(workdir: Path, runs: Path) -> None:
    shutil.copytree(runs / "one", workdir)
    shutil.rmtree(workdir / "checkpoints")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--workdir=RUN"], 2, "no picture is named"),
        (["x.png"], 2, "^error: --workdir is missing"),
        (["--workdir=nowhere", "x.png"], 2, "nowhere holds no run"),
        (["--workdir=BROKEN", "x.png"], 4, "holds no checkpoint"),
        (["--workdir=RUN", "x.png", "--platform=gup"], 2, "did you mean gpu"),
        (["--workdir=RUN", "x.png", "--platform=tpu"], 6, "no tpu device"),
        (["--workdir=RUN", "x.png", "--larges"], 2, "did you mean --largest"),
        (["--workdir=RUN", "x.png", "--save_preprocessed=a\0b"], 2, "which is no path"),
        (["--workdir=RUN", "x.png", "--save_preprocessed=RUN/config.json"], 6, "cannot write"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, status, message, runs, tmp_path, capsys):
    make_unreadable(tmp_path / "broken", runs)
    places = {"RUN": str(runs / "one"), "BROKEN": str(tmp_path / "broken")}
    words = [re.sub("RUN|BROKEN", lambda match: places[match[0]], word) for word in words]
    found, _, err = run(capsys, *words)
    assert (found, err.count("\n")) == (status, 1)
    assert re.search(message, err), err


# What the network saw


def test_what_the_network_saw_is_written(runs, pictures, tmp_path, capsys):
    (tmp_path / "again").mkdir()
    first, second = sorted(pictures.iterdir())[:2]
    shutil.copy(second, tmp_path / "again" / first.name)
    seen, words = tmp_path / "a" / "seen", (f"--workdir={runs / 'one'}", first, tmp_path / "again")
    assert run(capsys, *words, f"--save_preprocessed={seen}")[0] == 0
    names = [f"{first.stem}-28x28.png", f"{first.stem}-28x28-2.png"]
    assert {path.name for path in seen.iterdir()} == set(names)
    for name, path in zip(names, (first, second), strict=True):
        written = Image.open(seen / name)
        assert (np.asarray(written) == images.read_digit(path).image[..., 0]).all()


# As a person meets it


def start(*words, **options) -> subprocess.Popen:
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, **options
    )


WITH_A_BAR_AT_ONCE = """
import sys
from mnist_jax import __main__
from mnist_jax.commands import predict
predict.BAR_AFTER_S = 0
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_terminal_shows_a_bar_and_a_table(runs, pictures, tmp_path):
    shutil.copy(min(pictures.iterdir()), tmp_path / "[bold]x.png")
    words = ["predict", f"--workdir={runs / 'one'}", pictures, tmp_path / "[bold]x.png"]
    ours, theirs = pty.openpty()
    process = start("-c", WITH_A_BAR_AT_ONCE, *words, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux ends the reading once the process has gone
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"reading .*%", text)
    assert re.search(r"file +┃ label ┃ probability ┃ runner-up ┃ probability", text)
    assert "[bold]x.png" in text.replace("\r\n", "").replace(" ", "")
    assert text.count(" %") == 2 * 37


def test_a_reader_that_goes_away_ends_it_quietly(runs, pictures, tmp_path):
    for copy in range(4):
        for path in pictures.iterdir():
            shutil.copy(path, tmp_path / f"{copy} {path.name}")
    line = (
        f"{sys.executable} -m mnist_jax predict --workdir={runs / 'one'} {tmp_path} | head -n 1; "
        "echo ${PIPESTATUS[0]}"
    )
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.splitlines()[-1], done.stderr) == ("141", "")


def test_a_bar_waits_and_keeps_out_of_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(display.PipeConsole, "is_terminal", True)
    for seconds, wanted, shown in ((60, True, False), (0, False, False), (0, True, True)):
        monkeypatch.setattr(command, "BAR_AFTER_S", seconds)
        with command._bar(3, wanted=wanted) as advance:
            advance()
        out, err = capsys.readouterr()
        assert (out, "reading" in err) == ("", shown)
    reading, writing = os.pipe()
    with os.fdopen(reading), os.fdopen(writing, "w") as file:
        assert command._is_pipe(file)
    with (ROOT / "README.md").open() as file:
        assert not command._is_pipe(file)


# How good the answers are


def pictured(image: np.ndarray, rng: np.random.Generator, path: Path) -> Path:
    """Saves a digit as people's pictures might show it, at random; the name says in which form."""
    grey = image.astype(np.float32)
    times = float(np.exp(rng.uniform(np.log(0.5), np.log(20))))
    side = round(28 * times)
    smooth = Image.Resampling.BICUBIC if times > 1 else Image.Resampling.HAMMING
    ink = Image.fromarray(grey).resize((side, side), smooth)
    ink = np.asarray(ink.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)) / 255
    height, width = rng.integers(side, 2 * side + 1, 2)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    ink = np.pad(ink, ((top, height - side - top), (left, width - side - left))).clip(0, 1)
    paper, pen = (230, 30) if rng.random() < 0.7 else (40, 220)
    light = 1 - rng.uniform(0, 0.5) * np.linspace(0, 1, width)
    grey = ((paper + (pen - paper) * ink) * light).clip(0, 255)
    form = rng.choice(["jpeg", "coloured", "rgba", "palette", "16 bit", "webp"])
    path = path.with_name(f"{path.name} {form}.{'jpg' if form == 'jpeg' else 'png'}")
    levels = grey.astype(np.uint8)
    if form == "16 bit":
        picture = Image.fromarray((grey * 257).astype(np.uint16))
    elif form == "coloured":
        tint = rng.uniform(0.7, 1, 3)
        picture = Image.fromarray((grey[..., None] * tint).astype(np.uint8))
    elif form == "rgba":
        picture = Image.new("RGBA", (width, height), (20, 30, 90, 0))
        picture.putalpha(Image.fromarray((ink * 255).astype(np.uint8)))
    elif form == "palette":
        picture = Image.fromarray(levels).convert("RGB").quantize(16)
    else:
        picture = Image.fromarray(levels)
    quality = {"quality": int(rng.integers(30, 95))} if form in ("jpeg", "webp") else {}
    kind = {"jpeg": "JPEG", "webp": "WEBP"}.get(form, "PNG")
    picture.save(path, kind, **quality)
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
    forms = np.array([path.stem[5:] for path in paths])
    for form in set(forms):
        assert right[forms == form].mean() > untouched - 0.06, form
