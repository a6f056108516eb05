"""What the README and the pages in docs/ show works as it stands there."""

import dataclasses
import gzip
import hashlib
import itertools
import re
import shlex
import socket
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mnist_jax
from benchmarks import card, forecast, results, scaling, step
from mnist_jax import __main__, cli, config, data, draw, fit, models
from mnist_jax.config import Config
from mnist_jax.data import sources

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
TEXT = "\n".join(PAGES.values())
COMMANDS = re.findall(r"python train\.py [^`\n|&]*", TEXT)
PYTHON = {name: re.findall(r"```python\n(.*?)```", page, re.DOTALL) for name, page in PAGES.items()}
ON_DIGITS = partial(Config, dataset="digits", max_steps=3)
REAL_LISTEN = draw.listen


def shown(page: str, what: str) -> str:
    """The code of a page that contains a text."""
    return next(code for code in PYTHON[page] if what in code)


@pytest.fixture(scope="session")
def place(tmp_path_factory, data_dir):
    """A folder with the runs and the picture that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    for name, options in {"RUN": {}, "runs/ten": {"seeds": 2}, "runs/mine": {}}.items():
        fit(ON_DIGITS(model="logistic", data_dir=data_dir, workdir=folder / name, **options))
    image = data.load_dataset("digits", data_dir=data_dir).train.image[0, :, :, 0]
    picture = Image.fromarray(255 - image).resize((280, 280))
    (folder / "pictures").mkdir()
    for name in ("five.png", "seven.jpg", "pictures/another.png"):
        picture.save(folder / name)
    return folder


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python -m mnist_jax [^`\n|]*", TEXT))))
def test_other_commands_run(command, place, data_dir, monkeypatch, capsys):
    name, *words = shlex.split(command.replace("RUN...", "RUN RUN"))[3:]
    monkeypatch.chdir(place)
    monkeypatch.setattr(draw, "serve", lambda *_: None)  # for ever
    monkeypatch.setattr(draw, "listen", lambda host, port: REAL_LISTEN(host, 0))
    assert __main__.main([name, *words]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_training_commands_run_cut_short(command, data_dir, tmp_path):
    words = shlex.split(command.replace("=NAME", "=post"))[2:]
    if "--help" in words:
        return
    config = cli.parse_config(words, prog="train.py", description="")
    here = {"data_dir": data_dir, "manual_dir": None, "workdir": tmp_path / "run"}
    here["devices"] = None  # as many as shown are asked for below
    short = dataclasses.replace(config, dataset="digits", max_steps=2, **here)
    if config.model == "cnn" and config.seeds:
        short = dataclasses.replace(short, seeds=2)
    assert fit(short).record["steps"] == 2


def in_a_shell(command: str, data_dir: Path, workdir: Path) -> list[str]:
    """The last lines of training as shown but cut short, one for each process that prints any."""
    more = f"--dataset=digits --max_steps=2 --data_dir={data_dir} --workdir={workdir}"
    command = re.sub(r"python train\.py", f"{sys.executable} train.py {more}", command)
    shell = ["bash", "-c", f"{command}\nwait"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return re.findall("device .*|test accuracy: .*", done.stdout)


def test_many_devices_of_a_cpu_are_used_as_shown(data_dir, tmp_path):
    [command] = re.findall(r"JAX_NUM_CPU_DEVICES=8 python train\.py .*", PAGES["scaling.md"])
    device, _ = in_a_shell(command, data_dir, tmp_path / "run")
    assert device.startswith("device  8 × cpu")


def test_two_processes_train_as_shown(data_dir, tmp_path):
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    [commands] = re.findall(r"(python train\.py \S+:12345.* &\n.*)\n```", PAGES["scaling.md"])
    commands = re.sub("12345(.*)", rf"{port}\1 --model=logistic", commands)
    commands = commands.replace("& --model=logistic", "--model=logistic &")
    device, _ = in_a_shell(commands, data_dir, tmp_path / "run")
    assert device.endswith("of 2 processes, float32")


def test_the_scaling_shown_is_that_of_the_file():
    found = results.read(ROOT / "benchmarks" / "results" / "scaling-cpu-virtual.json")
    tables = [part for part in scaling.report(found) if not isinstance(part, str)]
    shown = PAGES["scaling.md"]
    assert tables and found.context["git_commit"][:7] in shown
    for line in itertools.chain(*map(card.as_markdown, tables)):
        assert line in shown.splitlines()


def test_the_prediction_shown_is_what_is_printed():
    [words] = re.findall(r"python -m benchmarks\.scaling (--predict.*)", PAGES["scaling.md"])
    options = cli.parse(scaling.Options, shlex.split(words), prog="", description="")
    [job] = step.jobs_of(options, ("many",), ("train",))
    rows = forecast.rows(job, options.assumed(job.batch_size), options, "assumed")
    for line in card.as_markdown(forecast.table(rows)):
        assert line in PAGES["scaling.md"].splitlines()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks[.\w]*)", TEXT))))
def test_benchmarks_exist(module):
    folder = ROOT / module.replace(".", "/")
    assert folder.with_suffix(".py").is_file() or (folder / "__main__.py").is_file()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|<img src=\"([^\":]+)\"", PAGES[name])
    for target in filter(None, (a or b for a, b in targets)):
        assert (folder / target).exists(), target


def test_the_model_shown_trains(monkeypatch, tmp_path, data_dir):
    exec(shown("forking.md", "class Wide"), namespace := dict(vars(models)))
    monkeypatch.setitem(models.MODELS, "wide", namespace["MODELS"]["wide"])
    record = fit(ON_DIGITS(model="wide", data_dir=data_dir, workdir=tmp_path / "run")).record
    assert record["parameters"] == 785 * 4096 + 4097 * 10


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as a gzipped IDX file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def test_the_data_set_shown_is_loaded(monkeypatch, tmp_path):
    code = shown("forking.md", 'SOURCES["letters"]')
    rng = np.random.default_rng(0)
    for part, name, count in (("TRAIN", "train", 300), ("TEST", "t10k", 100)):
        for kind, shape in (("IMAGES", (count, 28, 28)), ("LABELS", (count,))):
            high = 256 if kind == "IMAGES" else 10
            content = idx(rng.integers(0, high, shape, np.uint8))
            digits = "3" if kind == "IMAGES" else "1"
            (tmp_path / f"{name}-{kind.lower()}-idx{digits}-ubyte.gz").write_bytes(content)
            code = code.replace(f"{part}_{kind}_SIZE", str(len(content)))
            code = code.replace(f"{part}_{kind}_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sources, "SOURCES", before := sources.SOURCES)
    exec(code, dict(vars(sources)))
    try:
        monkeypatch.setattr(data, "DATASETS", (*before, "digits"))
        found = data.load_dataset("letters", data_dir=tmp_path / "data", manual_dir=tmp_path)
    finally:
        del before["letters"]
    assert (len(found.train.label), found.class_names[1]) == (300, "B")


def test_the_recipe_shown_is_a_preset(monkeypatch):
    monkeypatch.setattr(config, "PRESETS", dict(config.PRESETS))
    exec(shown("forking.md", 'PRESETS["slow"]'), vars(config))
    assert Config(preset="slow").average == 0.999
    assert Config(preset="slow").batch_size == 100


def test_the_loop_shown_learns(monkeypatch, data_dir, capsys):
    monkeypatch.setattr(mnist_jax, "load_dataset", partial(data.load_dataset, data_dir=data_dir))
    exec(shown("forking.md", "steps.train_step,"), {})
    assert float(capsys.readouterr().out) > 0.8


def test_the_call_from_python_works(monkeypatch, tmp_path, data_dir, capsys):
    here = {"data_dir": data_dir, "workdir": tmp_path / "run"}
    monkeypatch.setattr(mnist_jax, "Config", partial(ON_DIGITS, **here))
    exec(shown("README.md", "fit("), {})
    assert "(784, 512)" in capsys.readouterr().out


def test_a_model_s_functions_work(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(shown("README.md", "predict("), {})
    assert re.fullmatch(r"\[\d\] 0\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("page", ["tutorial.md", "tutorial.ko.md"])
def test_no_line_separates_xor_and_a_layer_does(page, capsys):
    exec(shown(page, "hidden_sizes=(8,)"), {})
    linear, layered = capsys.readouterr().out.splitlines()
    assert "loss 0.693" in linear
    assert layered.endswith("[0 1 1 0]")


@pytest.mark.mnist
@pytest.mark.parametrize("page", ["tutorial.md", "tutorial.ko.md"])
def test_the_data_are_as_shown(page, mnist_dir, tmp_path, monkeypatch, capsys):
    where = {"data_dir": tmp_path, "manual_dir": mnist_dir}
    monkeypatch.setattr(mnist_jax, "load_dataset", partial(data.load_dataset, **where))
    code = shown(page, 'load_dataset("mnist")')
    exec(code, {})
    said = re.findall(r"#\s*(\(.*)", code)
    assert capsys.readouterr().out.splitlines() == said


def test_both_tutorials_show_the_same_commands():
    pages = PAGES["tutorial.md"], PAGES["tutorial.ko.md"]
    blocks = [re.findall(r"```(?:sh|python)\n.*?```", page, re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1]
    numbers = [sorted(re.findall(r"\d+\.\d\d(?!\d)", page)) for page in pages]
    assert numbers[0] == numbers[1]
