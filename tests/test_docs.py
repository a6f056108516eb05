"""What the README and the pages in docs/ show works as it stands there."""

import collections
import dataclasses
import gzip
import hashlib
import json
import math
import re
import shlex
import socket
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mnist_jax
from mnist_jax import __main__, cli, config, data, fit, models
from mnist_jax.config import Config
from mnist_jax.data import sources
from mnist_jax.inference import draw
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs.statistics import welch

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
    name, *words = shlex.split(command.replace("RUN...", "RUN"))[3:]
    if name == "data":  # MNIST might have to be downloaded
        words += ["--dataset=digits", f"--data_dir={data_dir}"]
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


EIGHT = r"JAX_NUM_CPU_DEVICES=8 python train\.py --model=mlp --devices.*"
SPREAD = EIGHT + r"|python train\.py .*:12345 .* &\n.*"


@pytest.mark.parametrize("commands", sorted(set(re.findall(SPREAD, TEXT))))
def test_many_devices_and_processes_give_the_result_of_one(commands, data_dir, tmp_path):
    short = {"dataset": "digits", "epochs": 2, "data_dir": data_dir}
    alone = fit(Config(model="mlp", **short, workdir=tmp_path / "alone")).record
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    more = " ".join(f"--{name}={value}" for name, value in short.items())
    here = f"{sys.executable} train.py {more} --workdir={tmp_path / 'run'}"
    commands = commands.replace("12345", port).replace("python train.py", here)
    shell = ["bash", "-c", f"{commands}\nwait"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [device] = re.findall("device  (.*)", done.stdout)
    assert "8 × cpu" in device or "of 2 processes" in device
    [correct] = re.findall(r"test accuracy: .* \((\d+)/360\)", done.stdout)
    assert int(correct) == alone["test_correct"]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks[.\w]*)", TEXT))))
def test_benchmarks_exist(module):
    folder = ROOT / module.replace(".", "/")
    assert folder.with_suffix(".py").is_file() or (folder / "__main__.py").is_file()


def anchors(page: str) -> set[str]:
    """Where a link can lead within a page: what GitHub makes of its headings."""
    slugs: collections.Counter[str] = collections.Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M):
        text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


def broken(name: str, text: str) -> list[str]:
    """The links of a page that lead to no file, or to no heading of one."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^):]+)\)|<img src=\"([^\":]+)\"", text)

    def leads_somewhere(link: str) -> bool:
        target, _, anchor = link.partition("#")
        if target and not (folder / target).exists():
            return False
        return not anchor or anchor in anchors(PAGES[Path(target or name).name])

    return [link for link in (a or b for a, b in links) if not leads_somewhere(link)]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    assert not broken(name, PAGES[name])


def test_headings_are_anchors_as_github_names_them():
    page = "# `A_b`, *c* & d-e!\n## [95 %](x.md) 한글\n```sh\n# no\n```\n### Again\n### Again\n"
    assert anchors(page) == {"a_b-c--d-e", "95--한글", "again", "again-1"}
    links = "[](nowhere.md) [](recipes.md#nowhere) [](#nowhere) [](recipes.md#what-they-reach)"
    assert broken("tutorial.md", links) == ["nowhere.md", "recipes.md#nowhere", "#nowhere"]


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
    assert Config(preset="slow").ema_decay == 0.999
    assert Config(preset="slow").batch_size == 100


def test_the_loop_shown_learns(monkeypatch, data_dir, capsys):
    monkeypatch.setattr(mnist_jax, "load_dataset", partial(data.load_dataset, data_dir=data_dir))
    exec(shown("forking.md", "steps.train_step,"), {})
    assert float(capsys.readouterr().out) > 0.8


def test_the_sweep_shown_runs(monkeypatch, tmp_path, data_dir, capsys):
    monkeypatch.setattr(mnist_jax, "Config", partial(ON_DIGITS, data_dir=data_dir))
    monkeypatch.setattr(devices, "keep_compiled", lambda folder: [])
    monkeypatch.chdir(tmp_path)
    exec(shown("forking.md", "class Watcher"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0][:6] for line in lines] == ["1", "0.0003", "1", "0.001", "1", "0.0031"]


def test_the_call_from_python_works(monkeypatch, tmp_path, data_dir, capsys):
    here = {"data_dir": data_dir, "workdir": tmp_path / "run"}
    monkeypatch.setattr(mnist_jax, "Config", partial(ON_DIGITS, **here))
    exec(shown("README.md", "fit("), {})
    assert "(784, 512)" in capsys.readouterr().out


def test_a_model_s_functions_work(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(shown("running.md", "predict("), {})
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


# Numbers, which must be those of the records that the pages name


def record(name: str) -> dict:
    return json.loads((ROOT / name).read_text())


def percent(*shares: float) -> list[str]:
    return [f"{100 * share:.2f}" for share in shares]


def spread(statistics: dict) -> list[str]:
    return percent(statistics["mean"], statistics["sd"])


RUNS = {
    name: record(f"docs/results/mnist-{name}.json")
    for name in ("logistic-post", "mlp-post", "cnn-post", "cnn-fast", "cnn-fast-1234", "cnn-best")
}
ABLATIONS = record("benchmarks/results/mnist-ablations.json")["tables"]["ablations"]
CNN_POST = percent(  # after each epoch
    *(
        json.loads(row)["test/accuracy"]
        for row in (ROOT / "docs/results/mnist-cnn-post.jsonl").read_text().splitlines()
    )
)


def ablation(model: str, **change) -> dict:
    """The record of a row."""
    change = {name: list(v) if isinstance(v, tuple) else v for name, v in change.items()}
    [row] = [row for row in ABLATIONS if (row["model"], row["change"]) == (model, change)]
    return row


@pytest.mark.parametrize("page", ["tutorial.md", "tutorial.ko.md"])
def test_a_tutorial_s_percentages_are_recorded(page):
    """Each as often as it stands there, and no others."""
    logistic, mlp, fast = (RUNS[name] for name in ("logistic-post", "mlp-post", "cnn-fast"))
    votes = record("docs/results/mnist-mlp-post-ensemble.json")
    six = {"hidden_sizes": (256, 128, 64, 32, 32, 32)}
    rows = (
        ablation("mlp", activation="sigmoid"),
        ablation("mlp", **six, activation="sigmoid"),
        ablation("mlp", **six),
        ablation("mlp", hidden_sizes=(256,)),
    )
    expected = [
        *2 * percent(logistic["test_accuracy"][0], mlp["test_accuracy"][0]),  # and in a figure
        *spread(logistic["statistics"]["test_accuracy"]),
        *spread(ablation("logistic", normalize=False)["statistics"]),
        spread(logistic["statistics"]["test_accuracy"])[1],
        *2 * spread(mlp["statistics"]["test_accuracy"]),
        *percent(*(row["statistics"]["mean"] for row in rows)),
        *CNN_POST,
        max(CNN_POST),
        *percent(RUNS["cnn-fast-1234"]["test_accuracy"]),  # in a figure
        *percent(fast["statistics"]["test_accuracy"]["mean"], *fast["test_accuracy"]),
        *percent(RUNS["cnn-best"]["test_accuracy"]),
        *("99.99", "99.74", "99.82"),  # read in a figure, and two of other people's
    ]
    counts = [logistic["test_correct"][0], mlp["test_correct"][0]]
    for vote in (votes["averaged"], votes["majority"]):
        expected += percent(vote["accuracy"], *vote["ci95"])
        counts.append(vote["correct"])
    prose = re.sub(r"```python\n.*?```", "", PAGES[page], flags=re.DOTALL)
    found = re.findall(r"\d+\.\d\d(?!\d)", prose)
    assert collections.Counter(found) == collections.Counter(expected)
    assert re.findall(r"\((\d+)/10000\)", prose) == list(map(str, counts))


@pytest.mark.parametrize("page", ["tutorial.md", "tutorial.ko.md"])
def test_a_tutorial_s_counts_are_those_of_the_networks(page):
    def sizes(name: str) -> dict[str, int]:
        key = jax.random.key(0)
        params = jax.eval_shape(partial(models.init_params, models.MODELS[name]()), key)
        layers = params.items()
        return {k: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(v)) for k, v in layers}

    cnn = sizes("cnn")
    expected = [sum(sizes("logistic").values()), sum(sizes("mlp").values()), cnn["logits"]]
    expected += [cnn[a] + cnn[b] for a, b in (("conv1", "conv2"), ("conv3", "conv4"))]
    expected += [cnn["dense1"] + cnn["dense2"], 70_000, 60_000, 10_000]
    assert set(re.findall(r"\d+(?:,\d{3})+", PAGES[page])) == {f"{n:,}" for n in expected}
    assert f" {cnn['conv1']}" in PAGES[page]


@pytest.mark.parametrize("page", ["README.md", "recipes.md"])
@pytest.mark.parametrize("name", ["logistic-post", "mlp-post", "cnn-fast", "cnn-best"])
def test_a_table_s_row_is_the_record_of_its_command(page, name):
    run = RUNS[name]
    here = {"data_dir": Config().data_dir, "manual_dir": None, "platform": "auto"}
    trained = Config.from_json(run["config"])
    command = dataclasses.replace(trained, **here).command_line()
    [row] = [line for line in PAGES[page].splitlines() if line.endswith(f"| `{command}` |")]
    if trained.seeds:
        mean, sd = spread(run["statistics"]["test_accuracy"])
        assert f"{mean} % ({sd})" in row or f"| {mean} ({sd})" in row
    else:
        assert re.search(rf"\| {percent(run['test_accuracy'])[0]}( %)? \|", row)
    alone = RUNS.get(f"{name}-1234", run)
    seconds = alone["timings"]["train_s"] / (alone.get("seeds") or 1)
    assert f"| {seconds:.{int(seconds < 1)}f} s" in row
    if page == "recipes.md" and trained.seeds:
        low, high = percent(*run["statistics"]["test_accuracy"]["ci95"])
        assert f"| {low} to {high} |" in row


def test_the_other_numbers_of_the_readme_are_recorded():
    page = " ".join(PAGES["README.md"].split())
    mean, sd = spread(ablation("logistic", normalize=False)["statistics"])
    assert f"| {mean} % ({sd}) |" in page
    models = ("logistic-post", "mlp-post", "cnn-fast")
    means = [RUNS[name]["statistics"]["test_accuracy"]["mean"] for name in models]
    first = re.search(r"\((\S+) %\).*? \((\S+) %\).*? \((\S+) %, and (\S+) % in", page)
    assert first
    rounded = [f"{100 * mean:.1f}" for mean in means]
    assert list(first.groups()) == [*rounded[:2], f"{float(CNN_POST[-1]):.1f}", rounded[2]]
    for file in ("README.md", "tutorial.md", "tutorial.ko.md"):
        [figure] = re.findall(r"figures/time.svg.*", PAGES[file])
        ends = [RUNS[f"{name}-post"]["test_accuracy"][0] for name in ("logistic", "mlp")]
        ends.append(RUNS["cnn-fast-1234"]["test_accuracy"])
        assert re.findall(r"(\d+\.\d\d) %", figure) == percent(*ends)
    assert f"{CNN_POST[-1]} % ({float(CNN_POST[-1]) * 100:.0f}/10000)" in page


def test_the_table_of_ablations_is_its_record():
    rows = re.findall(
        r"^\| *(?:logistic|mlp)? \| (?:none|`).*\|$", PAGES["recipes.md"], re.MULTILINE
    )
    assert len(rows) == len(ABLATIONS)
    base = {}
    for row, found in zip(rows, ABLATIONS, strict=True):
        flags = found["command"].split(" --")[1:]
        kept = ("model=", "dataset=", "epochs=", "seeds=")
        changed = " ".join(f"--{flag}" for flag in flags if not flag.startswith(kept))
        first = base.setdefault(found["model"], found)
        cells = [f"`{changed.replace('--no_', '--no-')}`" if changed else "none: as `tutorial`"]
        cells += spread(found["statistics"])
        if changed:
            test = welch(*(np.array(side["test_accuracy"]) for side in (first, found)))
            low, high = (f"{100 * end:+.2f}" for end in test["ci95"])
            cells += [f"{100 * test['difference']:+.2f}", f"{low} to {high}"]
        assert " | ".join(cells) in row
