"""The report: what it says, that it is escaped, and that it needs nothing but itself."""

import base64
import dataclasses
import html
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from shared import StopAfter

from mnist_jax import Config, Dataset, __main__, cli, fit, load_run, models, reporting
from mnist_jax.atomic_io import digest_lines
from mnist_jax.data import DataSpec
from mnist_jax.errors import InterruptedRunError
from mnist_jax.inference.restore import LoadedRun, Prediction, dataset_of
from mnist_jax.reporting import report
from mnist_jax.runs.run_dir import read_config, read_result


class Page:
    """The HTML of a page, its text and the addresses of its images."""

    def __init__(self, path: Path):
        self.html = path.read_text()
        text = re.sub(r"(?s)<style>.*?</style>|<[^>]+>", " ", self.html)
        self.text = " ".join(html.unescape(text).split())
        self.images = re.findall(r'<img src="([^"]*)"', self.html)

    def config(self) -> Config:
        (command,) = re.findall(r"python train\.py .*?(?= Environment)", self.text)
        return cli.parse(Config, shlex.split(command)[2:], prog="", description="")


@pytest.fixture
def page_of(capsys, data_dir) -> Callable[..., Page]:
    def run(*words) -> Page:
        assert __main__.main(["report", *map(str, words), f"--data_dir={data_dir}"]) == 0
        return Page(Path(capsys.readouterr().out.splitlines()[-1].removeprefix("report: ")))

    return run


def test_a_page_says_what_the_run_was(runs, page_of):
    page, record = page_of(runs / "one"), read_result(runs / "one")
    correct, accuracy = record["test_correct"], f"{100 * record['test_correct'] / 360:.2f} %"
    for text in (
        f"logistic on digits {accuracy} test accuracy",
        f"Test images: {accuracy} ({correct}/360), 95 % interval ",
        "trained for 42 steps with batches of 100 images (epochs: 3)",
        f"{360 - correct} errors",
        "Learning curves", "Confusion matrix", "Most confident errors",
        "Weights of the first layer",
        "Layers layer kind output shape parameters flatten Flatten 784 0 logits Dense 10 7,850",
        f"train {record['timings']['train_s']:,.1f}",
        "validation 100 0",  # in this run, in the preset
        record["environment"]["system"],
    ):  # fmt: skip
        assert text in page.text
    assert "not complete" not in page.text
    config, _ = read_config(runs / "one")
    assert page.config().resolve().hyperparameters() == config.hyperparameters()


def test_a_page_of_several_seeds_has_their_statistics(runs, page_of):
    page = page_of(runs / "many")
    found = read_result(runs / "many")["statistics"]["test_accuracy"]
    assert f"{100 * found['mean']:.2f} % test accuracy" in page.text
    assert f"mean of 3 seeds, sd {100 * found['sd']:.2f}, 95 % interval" in page.text
    assert "errors of 3 networks" in page.text and ", seed 1234" in page.text
    assert page.config().seeds == 3


def test_a_page_of_a_grid_has_a_row_for_each_point_and_no_mean(runs, page_of):
    page = page_of(runs / "grid")
    accuracy = np.array(read_result(runs / "grid")["test_accuracy"]) * 100
    low, high = accuracy.reshape(2, 2).mean(1)
    for text in (
        f"{min(accuracy):.2f} to {max(accuracy):.2f} % from the worst to the best of 4 networks",
        f"learning_rate 1e-05 {low:.2f} % ",
        f"learning_rate 0.01 {high:.2f} % ",
    ):
        assert text in page.text
    assert f"{(low + high) / 2:.2f} %" not in page.text


def test_several_runs_stand_side_by_side(runs, page_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = page_of(runs / "one", runs / "many")
    assert (tmp_path / "report.html").exists() and len(page.images) == 2
    one, many = (read_result(runs / name) for name in ("one", "many"))
    for text in (
        "2 runs on digits",
        f"1 logistic {100 * one['test_accuracy']:.2f} % ",
        f"2 logistic {100 * many['statistics']['test_accuracy']['mean']:.2f} % ",
        "Accuracy against training time",
        "validation 100 0",
        "seed 5 1234",
    ):
        assert text in page.text
    assert page.text.count("python train.py --model=") == 2


def test_a_page_needs_nothing_but_itself_and_escapes_everything(runs, page_of, tmp_path):
    hostile = '<img src=x onerror=alert(1)>&"\u202e'
    folder = shutil.copytree(runs / "one", tmp_path / hostile)
    for name in ("environment", "result"):
        content = json.loads((folder / f"{name}.json").read_text())
        content.update(warnings=[f"<script>{hostile}"], system=hostile, odd="\ud800")
        (folder / f"{name}.json").write_text(json.dumps(content))
    contents = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    (folder / "manifest.sha256").write_bytes(digest_lines(contents))
    page = page_of(folder, f"--output={tmp_path / 'page.html'}")
    assert len(page.html.encode()) < 1_000_000 and "Content-Security-Policy" in page.html
    assert page.text.count(hostile) >= 3  # the folder, the warning and the environment
    assert not re.search(r"<(script|iframe|object|form)|@import|url\(|https?:", page.html)
    sources = re.findall(r'(?:src|srcset|href|action|poster)="([^"]*)"', page.html)
    assert all(source.startswith("data:") for source in sources)
    assert "<img src=x" not in page.html and len(page.images) == 4
    for source in page.images:
        svg = base64.b64decode(source.partition(",")[2]).decode()
        assert not re.search(r'<script|<foreignObject|@import|url\((?!#)|href="(?!#|data:)', svg)
    both = page_of(runs / "one", folder, f"--output={tmp_path / 'both.html'}")
    assert f"2 logistic: <script>{hostile}" in both.text


def test_a_run_that_is_not_complete_has_a_page(runs, config, page_of, tmp_path, capsys):
    run = config(epochs=10, steps_per_call=5)
    with pytest.raises(InterruptedRunError):
        fit(run, callbacks=[StopAfter(1)])
    page = page_of(folder := run.workdir)
    assert "logistic on digits, not complete" in page.text
    assert "trained for 5 steps" in page.text and "(of 10 epochs)" in page.text
    assert "Learning curves" not in page.text
    page = page_of(runs / "one", folder, f"--output={tmp_path / 'two.html'}")
    assert "2 logistic - - 0 5 7,850" in page.text and "is not complete: it has" in page.text
    assert (folder / "report.html").exists()
    fit(run, callbacks=reporting.make_callbacks(run))
    assert f"report  python -m mnist_jax report {folder}" in capsys.readouterr().out


def test_training_writes_it(config, page_of, capsys):
    config = config(report=True, epochs=1)
    page = config.workdir / "report.html"
    fit(config, callbacks=reporting.make_callbacks(config))
    assert capsys.readouterr().out.splitlines()[-2] == f"report  {page}"
    by_training = page.read_bytes()
    page_of(config.workdir)
    assert page.read_bytes() == by_training
    page.unlink()
    fit(config, callbacks=reporting.make_callbacks(config))  # the run is already complete
    assert page.read_bytes() == by_training
    page.unlink()
    page.mkdir()
    capsys.readouterr()
    fit(config, callbacks=reporting.make_callbacks(config))  # a failure is no failure of the run
    out, err = capsys.readouterr()
    assert err.startswith("warning: no report was written: cannot write ")
    assert out.splitlines()[-1].startswith("test accuracy: ")


def test_every_warning_stands_on_the_page(runs, data_dir):
    run = load_run(runs / "many")._replace(warnings=["one checkpoint is damaged"])
    run.members[1] = jax.tree.map(lambda x: np.full_like(x, np.nan), run.members[1])
    data = dataclasses.replace(dataset_of(run, data_dir=data_dir), warnings=("other data",))
    excluded = f"seed 1235 of {run.folder} is not finite; it is excluded"
    assert report.run_page(run, data)["warnings"] == [*run.warnings, *data.warnings, excluded]


def test_the_most_confident_errors_come_first():
    x = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((5, 28, 28), np.uint8)
    data = Dataset.from_arrays("mine", x, y := [0, 0, 0, 1, 1], x, y)
    shares = np.array([0.4, 0.1, 0.2, 0.7, 0.3])  # of class 0; the last answer is right
    prediction = Prediction(np.log([np.c_[shares, 1 - shares]]), [{"seed": 0}], [])
    _, errors = report.confusion_figures(data, prediction)
    [axes] = errors.figure.axes
    places = [text.get_position() for text in axes.texts]
    shown = [int(axes.images[0].get_array()[int(y) + 10, int(x)]) for x, y in places]
    assert shown == [1, 2, 3, 0]
    titles = "0 → 1\n90.00 %", "0 → 1\n80.00 %", "1 → 0\n70.00 %", "0 → 1\n60.00 %"
    assert tuple(text.get_text() for text in axes.texts) == titles


def test_the_first_layer_is_shown_if_it_takes_pixels():
    class NoLayer(nn.Module):
        image_shape: tuple = (28, 28, 1)

        @nn.compact
        def __call__(self, x, *, train=False):
            return x.reshape(len(x), -1) @ self.param("w", nn.initializers.zeros, (784, 10))

    config = Config(model="mlp", seed=5, seeds=2)
    data = DataSpec("digits", (28, 28, 1), tuple("0123456789"))
    for kind, captions in (
        (models.LogisticRegression, ["Pixel weights of each class, seed 6."]),
        (models.MLP, ["64 of 256 units of dense1, seed 6."]),
        (models.CNN, ["64 filters of conv1, seed 6."]),
        (NoLayer, []),
    ):
        shapes = models.variable_shapes(model := kind())[0]
        params = jax.tree.map(lambda x: np.arange(x.size, dtype=float).reshape(x.shape), shapes)
        run = LoadedRun(Path(), config, data, model, [({}, {}), (params, {})], 0, [], {}, [])
        figures = report.weights_figures(run, {"seed": 6})
        assert [figure.caption.partition(" Blue")[0] for figure in figures] == captions
        if kind is models.MLP:  # unit 0 at the top left, its pixels row by row
            canvas = figures[0].figure.axes[0].images[0].get_array()
            assert canvas[1, 2] == params["dense1"]["kernel"][30, 0]
