"""The page of a run: what it says, that it is escaped, and that it needs nothing but itself."""

import base64
import dataclasses
import json
import re
import runpy
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

import train
from mnist_jax import Config, __main__, cli, fit, models
from mnist_jax import atomic_io as storage
from mnist_jax.errors import InterruptedRunError
from mnist_jax.inference import restore as saved
from mnist_jax.reporting import pictures, report
from mnist_jax.signals import Stop
from mnist_jax.training import Callback

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data_dir):
    """A run of one seed and one of three."""
    folder = tmp_path_factory.mktemp("runs")
    base = {"dataset": "digits", "data_dir": data_dir}
    fit(Config(model="logistic", epochs=3, validation=100, workdir=folder / "one", **base))
    fit(Config(model="mlp", epochs=2, seeds=3, shift=1.0, workdir=folder / "many", **base))
    return folder


class Seen(HTMLParser):
    """What a reader of a page meets: its text, its elements and their attributes."""

    def __init__(self, page: bytes):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(page.decode())
        self.text = " ".join(" ".join(self.pieces).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] != "style":
            self.pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def made(capsys, data_dir, *words) -> Seen:
    """The page that the command makes of these folders and flags."""
    assert __main__.main(["report", *map(str, words), f"--data_dir={data_dir}"]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("report: "))
    return Seen(path.read_bytes())


def command_of(page: Seen) -> list[str]:
    (command,) = re.findall(r"python train\.py .*?(?= Environment)", page.text)
    return shlex.split(command)[2:]


def test_a_page_says_what_the_run_was(folders, data_dir, capsys):
    folder = folders / "one"
    page = made(capsys, data_dir, folder)
    record = json.loads((folder / "result.json").read_text())
    correct = record["test_correct"]
    assert f"{100 * correct / 360:.2f} % test accuracy" in page.text
    assert f"{correct} of the 360 test images are classified rightly" in page.text
    assert re.search(r"it is within \d\d\.\d\d to \d\d\.\d\d % \(95 % interval\)", page.text)
    assert "out of 1,337 images; 3 of 3 epochs are complete" in page.text  # 100 are held out
    for heading in ("Learning curves", "What was taken for what", "Wrong and sure of it", "Layers",
                    "What the first layer looks for", "Can its probabilities be believed?",
                    "Epochs", "Time", "StepConfig", "Environment"):  # fmt: skip
        assert heading in page.text
    assert "total 7,850" in page.text
    assert f"training {record['timings']['train_s']:,.1f}" in page.text
    assert record["environment"]["system"] in page.text
    assert "validation 100 0" in page.text  # here and usually
    config = cli.parse_config(command_of(page), prog="", description="")
    assert config.hyperparameters() == saved.load_config(folder).hyperparameters()
    assert config.data_dir == saved.load_config(folder).data_dir
    assert "not complete" not in page.text


def test_a_run_of_several_seeds_has_their_statistics(folders, data_dir, capsys):
    page = made(capsys, data_dir, folders / "many")
    found = json.loads((folders / "many" / "result.json").read_text())["statistics"]
    found = found["test_accuracy"]
    assert f"{100 * found['mean']:.2f} % test accuracy" in page.text
    assert "The mean of 3 networks, with the seeds 1234 to 1236" in page.text
    for value in (found["sd"], found["ci95"][1], found["best"], found["worst"]):
        assert f"{100 * value:.2f} %" in page.text
    assert "The answers of all 3 networks are counted" in page.text
    assert "of seed 1234" in page.text  # whose weights are shown
    config = cli.parse_config(command_of(page), prog="", description="")
    assert (config.seeds, config.shift) == (3, 1.0)


@pytest.mark.parametrize("names", [["one"], ["many"], ["one", "many"]])
def test_a_page_needs_nothing_but_itself(names, folders, data_dir, capsys, tmp_path):
    output = tmp_path / "page.html"
    page = made(capsys, data_dir, *(folders / name for name in names), f"--output={output}")
    assert output.stat().st_size < 2_000_000
    addresses = [
        value
        for _, attrs in page.elements
        for name, value in attrs.items()
        if name in ("src", "srcset", "href", "action", "data", "poster", "background") and value
    ]
    assert len(page.all("img")) == 2 * (2 if len(names) > 1 else 5)  # light and dark
    assert all(address.startswith("data:") for address in addresses)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.elements}
    text = output.read_text()
    assert not re.search(r"@import|url\(|https?:", text)
    for image in page.all("img"):
        svg = base64.b64decode((image["src"] or "").partition(",")[2]).decode()
        assert not re.search(r"<script|<foreignObject|@import|url\((?!#)", svg)
        assert all(
            href[0] == "#" or href.startswith("data:") for href in re.findall(r'href="([^"]+)', svg)
        )
    for image in page.all("img"):
        assert len(image["alt"] or "") > 20
        assert int(image["width"] or 0) > 300


HOSTILE = '<img src=x onerror=alert(1)>&"\u202e'


def test_what_stands_in_a_run_s_files_is_only_text(folders, data_dir, capsys, tmp_path):
    folder = tmp_path / HOSTILE
    shutil.copytree(folders / "one", folder)
    for name in ("environment", "result"):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        content.update(notices=[f"<script>{HOSTILE}"], system=HOSTILE, odd="\ud800")
        path.write_text(json.dumps(content))
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    contents = {name: (folder / name).read_bytes() for name in names}
    (folder / "manifest.sha256").write_bytes(storage.digest_lines(contents))
    page = made(capsys, data_dir, folder, f"--output={tmp_path / 'page.html'}")
    assert {image["src"] == "x" for image in page.all("img")} == {False}
    assert not page.all("script")
    assert page.text.count(HOSTILE) == 3  # the folder, the notice and the environment
    several = made(capsys, data_dir, folder, folders / "one", f"--output={tmp_path / 'two.html'}")
    assert len(several.all("img")) == 4 and HOSTILE in several.text


@pytest.mark.parametrize("odd", [None, "x", 7, [], {"train_s": "x"}, {"train_s": 10**400}])
def test_a_result_with_odd_values_still_has_a_page(odd, folders, data_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders / "one", folder)
    content = json.loads((folder / "result.json").read_text())
    content.update(timings=odd, notices=odd, test_correct=odd)
    (folder / "result.json").write_text(json.dumps(content))
    names = ("config.json", "environment.json", "metrics.jsonl", "result.json")
    contents = {name: (folder / name).read_bytes() for name in names}
    (folder / "manifest.sha256").write_bytes(storage.digest_lines(contents))
    run = saved.load_run(folder)
    predictions = SimpleNamespace(right=np.ones((1, 360), bool), notices=[])
    dataset = SimpleNamespace(
        warnings=(), test=SimpleNamespace(label=np.zeros(360)), validation=(),
        train=SimpleNamespace(label=range(7)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "of_one", lambda *_: iter(()))
        page = Seen(report.render(report.of_one(run, dataset, predictions)))
    assert "the run counted" in page.text


def test_a_run_that_is_not_complete_says_so(data_dir, tmp_path, capsys):
    stop = Stop()

    class StopSoon(Callback):
        def on_chunk_end(self, epoch, step, last_step, sums, train_s):
            if step:
                stop.signal = 15

    folder = tmp_path / "run"
    config = Config(
        model="logistic", dataset="digits", data_dir=data_dir, workdir=folder, steps_per_call=5
    )
    with pytest.raises(InterruptedRunError):
        fit(config, observer=StopSoon(), stop=stop)
    page = made(capsys, data_dir, folder)
    assert "logistic on digits, not complete" in page.text
    assert f"{folder} is not complete: it stands at step 5" in page.text
    assert "0 of 10 epochs are complete" in page.text
    assert "Learning curves" not in page.text
    several = made(capsys, data_dir, folder, folder, f"--output={tmp_path / 'two.html'}")
    assert "1 logistic - - - 5 7,850" in several.text
    fit(dataclasses.replace(config, max_steps=20, workdir=tmp_path / "short"))  # of 15 an epoch
    assert "20 steps of 100 out of 1,437 images; 1 of 10 epochs are complete" in (
        made(capsys, data_dir, tmp_path / "short").text
    )


def test_several_runs_stand_side_by_side(folders, data_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "predict_all", None)  # their own counts are shown
    monkeypatch.setattr(saved, "load_dataset", None)  # and no image
    page = made(capsys, data_dir, folders / "one", folders / "many")
    assert (tmp_path / "report.html").exists()
    one = json.loads((folders / "one" / "result.json").read_text())
    many = json.loads((folders / "many" / "result.json").read_text())
    assert f"{one['test_correct']} of 360" in page.text
    assert f"{100 * many['statistics']['test_accuracy']['mean']:.2f} % mean of 3 seeds" in page.text
    assert "2 runs on digits" in page.text and "What the accuracy costs" in page.text
    assert "epochs 3 2" in page.text  # where they differ
    assert f" {one['steps']} {one['parameters']:,} " in page.text
    assert page.text.count("python train.py --model=") == 2
    twice = made(capsys, data_dir, folders / "one", folders / "one")
    assert "1 logistic" in twice.text and "2 logistic" in twice.text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "no run is named; name the folders"),
        (["nowhere"], 2, "nowhere holds no run"),
        (["{one}", "--output=a\0"], 2, r"output is 'a\\x00', which is no path"),
        (
            ["{one}", "--output={one}/nowhere/x.html"],
            6,
            "cannot write .*No such file.*another file",
        ),
        (["{one}", "--platform=gup"], 2, "did you mean gpu"),
        (["{one}", "--output={one}/config.json"], 2, "config.json is there and is no page"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, status, message, folders, data_dir, capsys):
    words = [word.replace("{one}", str(folders / "one")) for word in words]
    assert __main__.main(["report", *words, f"--data_dir={data_dir}"]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_a_damaged_run_has_no_page(folders, data_dir, capsys, tmp_path):
    shutil.copytree(folders / "one", tmp_path / "changed")
    (tmp_path / "changed" / "result.json").write_text("{}")
    shutil.copytree(folders / "one", tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "checkpoints")
    for name, message in (("changed", "the result is damaged"), ("empty", "holds no checkpoint")):
        words = [str(tmp_path / name), f"--data_dir={data_dir}", f"--output={tmp_path}/page.html"]
        assert __main__.main(["report", *words]) == 4
        assert message in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()


def test_training_makes_it_or_names_the_command(data_dir, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "a run"
    words = ["--model=logistic", "--dataset=digits", "--epochs=1"]
    words += [f"--data_dir={data_dir}", f"--workdir={folder}"]
    assert train.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("test accuracy: ")
    assert lines[-2].startswith("report  python -m mnist_jax report ")
    assert not (folder / "report.html").exists()
    assert __main__.main([*shlex.split(lines[-2])[4:], f"--data_dir={data_dir}"]) == 0
    capsys.readouterr()
    by_command = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert train.main([*words, "--report"]) == 0  # of a run that is complete
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"report  {folder / 'report.html'}", lines[-1]]
    assert (folder / "report.html").read_bytes() == by_command
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert train.main([*words, "--report"]) == 0  # of a run that is as complete without
    assert "notice: no report was made: cannot write" in capsys.readouterr().out
    shutil.rmtree(folder)
    assert train.main([*words, "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"report  {folder / 'report.html'}"
    assert __main__.main(["verify", str(folder), f"--data_dir={data_dir}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "OK"


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("logistic", "logits", (10, 28, 28)),
        ("mlp", "dense1", (256, 28, 28)),
        ("cnn", "conv1", (64, 3, 3)),
    ],
)
def test_the_first_layer_is_seen_as_images(name, layer, shape):
    model = models.MODELS[name]()
    params = jax.tree.map(
        lambda leaf: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape),
        models.param_shapes(model),
    )
    run = SimpleNamespace(
        model=model,
        config=Config(model=name, seed=5, seeds=2),
        members=[jax.tree.map(lambda leaf: leaf * np.nan, params), params],
    )
    found = pictures.first_layer(run)
    assert found is not None
    assert found[:2] == (layer, 6)  # the first member is lost
    kernel = params[layer]["kernel"]
    unit, y, x = 3, 1, 2
    assert found[2].shape == shape
    at = kernel[y, x, 0, unit] if kernel.ndim == 4 else kernel[y * 28 + x, unit]
    assert found[2][unit, y, x] == at


def test_a_network_of_its_own_parameters_has_no_first_layer():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return x.reshape(len(x), -1) @ self.param("w", nn.initializers.zeros, (784, 10))

    assert pictures.first_layer(SimpleNamespace(model=Own())) is None


def test_the_documentation_s_figures_are_made(folders, data_dir, tmp_path, capsys):
    words = [str(folders / "one"), str(folders / "many"), f"--data_dir={data_dir}"]
    script = runpy.run_path(str(ROOT / "docs" / "make_figures.py"))
    assert script["main"]([*words, f"--output={tmp_path}"]) == 0
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {"digit.png", "samples.png", "curves.svg", "time.svg"} < set(files)
    for model in ("logistic", "mlp"):
        names = ("curves.svg", "confusion.svg", "errors.png", "weights.png", "reliability.svg")
        assert {f"{model}-{name}" for name in names} < set(files)
    assert max(files.values()) <= 150_000
    shown = Seen(capsys.readouterr().out.encode()).all("img")
    assert {image["src"] for image in shown} == {f"figures/{name}" for name in files}
    assert script["main"]([words[0], words[0], words[-1]]) == 2
    assert "two runs are of the same model" in capsys.readouterr().err
