"""The commands, the code and the links of README.md and docs/ work."""

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import ROOT, python, write_forks

from mnist_jax import Config, __main__, cli, data, fit

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
TUTORIAL, KOREAN, FORKING = "docs/tutorial.md", "docs/tutorial.ko.md", "docs/forking.md"


def commands(start: str) -> list[str]:
    return sorted({match.strip() for text in PAGES.values() for match in re.findall(start, text)})


TRAIN = commands(r"python train\.py [^`\n|#&]*")
COMMANDS = commands(r"python -m mnist_jax [^`\n|#]*")


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def make_place(folder: Path) -> str:
    """A folder with the runs and pictures that the pages name; also a home."""
    data_dir = folder / ".cache" / "mnist_jax"
    for name, seeds in {"RUN": None, "runs/cnn": None, "runs/ten": 2}.items():
        options = {"dataset": "digits", "data_dir": data_dir, "workdir": folder / name}
        fit(Config(model="logistic", max_steps=3, seeds=seeds, **options))
    shutil.copytree(folder / "RUN", folder / "runs" / "mine")
    image = data.load_dataset("digits", data_dir=data_dir).train.image[0, :, :, 0]
    (folder / "pictures").mkdir()
    write_forks(folder)
    for name in ("five.png", "seven.jpg", "pictures/another.png"):
        Image.fromarray(255 - image).resize((280, 280)).save(folder / name)
    return str(folder)


@pytest.fixture
def here(once, monkeypatch):
    place = once("docs", make_place)
    monkeypatch.setenv("HOME", place)
    monkeypatch.chdir(place)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, here, monkeypatch, capsys):
    name, *words = shlex.split(command.replace("RUN...", "RUN"))[3:]
    if name == "data":  # MNIST might have to be downloaded
        words.append("--dataset=digits")
    if name == "draw":  # would serve until Ctrl-C
        monkeypatch.setattr(__main__._load(name), "run", lambda self: print(self))
    assert __main__.main([name, *words]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", TRAIN)
def test_training_commands_are_configs(command, here):
    words = shlex.split(command)[2:]
    if "--help" not in words:
        cli.parse(Config, words, prog="train.py", description="").resolve()


@pytest.mark.mnist
@pytest.mark.campaign
@pytest.mark.parametrize("command", [c for c in TRAIN if "--coordinator" not in c])
def test_training_commands_train(command, mnist_dir, data_dir, tmp_path):
    """In full; of many seeds only one epoch, of the CNN only the first steps."""
    words = [str(ROOT / "train.py"), *shlex.split(command)[2:]]
    if "--dataset=letters" in words or any("teacher=" in word for word in words):
        pytest.skip("test_forking.py trains it, on data and with a teacher of its own")
    words = [word for word in words if not word.startswith(("--workdir", "--manual_dir"))]
    write_forks(tmp_path)
    words += [f"--manual_dir={mnist_dir}", f"--data_dir={data_dir}", f"--workdir={tmp_path}/run"]
    if not re.search("--model=(logistic|mlp)", command):
        words.append("--max_steps=5")
    elif "--seeds" in command:
        words.append("--epochs=1")
    devices = "8" if "--devices" in command else "1"
    done = python(*words, cwd=tmp_path, JAX_NUM_CPU_DEVICES=devices)
    assert "--help" in words or "test accuracy: " in done.stdout.splitlines()[-1]


def test_flags_and_benchmarks_exist():
    assert all(map(importlib.util.find_spec, commands(r"python -m (benchmarks[.\w]*)")))
    kinds = Config, *map(__main__._load, __main__.COMMANDS)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    known |= {"help", "debug", "campaign", "campaign_record"}
    known |= {alias.strip("-").removeprefix("no-") for alias in cli.ALIASES}
    known |= {"require_hashes", "deps", "logdir"}  # of pip and TensorBoard
    others = {"docs/benchmarks.md", "docs/scaling.md", "docs/convolution.md"}
    text = "\n".join(PAGES[name] for name in PAGES.keys() - others)
    found = re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)
    assert {flag.replace("-", "_").removeprefix("no_") for flag in found} <= known


@pytest.mark.parametrize(
    ("page", "text", "printed"),
    [
        ("README.md", "fit(", r"(?s).*digits 0\.\d+\n\(784, 512\)\n"),
        ("docs/running.md", "predict(", r"\[\d\] 0\.\d+\n"),
        (TUTORIAL, "load_dataset", r"\(1437, 28, 28, 1\) uint8\n\(360, 28, 28, 1\) \d\n"),
        (TUTORIAL, "def train_step", r"(?s)1 test.*10 test accuracy 0\.[89]\d+\n"),
        (TUTORIAL, "class CNN", "5,259,594 parameters\n"),
        (TUTORIAL, "hidden_sizes=(8,)", r".* loss 0\.693 .*\n.*\[0 1 1 0\]\n"),
        (FORKING, "class Norms", r"(\d \d+\.\d+\n){3}"),
    ],
)
def test_code_prints(page, text, printed, here, capsys):
    """With the digits in place of MNIST, a model that compiles fast, and short runs."""
    code = next(code for code in blocks(page) if text in code)
    code = code.replace('"mnist"', '"digits"').replace('MODELS["mlp"]', 'MODELS["logistic"]')
    exec(re.sub(r"Config\((?=\w)", 'Config(dataset="digits", max_steps=3, ', code), {})
    assert re.fullmatch(printed, capsys.readouterr().out)


def test_the_forks_have_as_many_lines_as_the_table_says():
    """The lines of a definition but blank ones, imports and comments."""
    sizes = {}
    for part in "\n\n".join(blocks(FORKING)).split("\n\n\n"):
        if match := re.match(r"(?:class|def) (\w+)", part):
            sizes[match[1]] = len(re.findall(r"^ *(?!#|import |from )\S.*", part, re.M))
    table = PAGES[FORKING][: PAGES[FORKING].index("## A network")]
    words = ("ResNet", "EMNIST", "SAM", "mixup", "focal", "squared", "distillation", "norm of")
    names = ("ResNet", "letters", "sam", "mixup", "focal", "squared_error", "distill", "Norms")
    for word, name in zip(words, names, strict=True):
        [row] = [row for row in table.splitlines() if word in row and row.startswith("|")]
        _, lines = row.split("| 0 |")  # none in the package
        assert re.search(rf"\b{sizes[name]}\b", lines), (row, name, sizes[name])
    assert len(PAGES[FORKING].splitlines()) <= 200


def test_the_minimal_script_trains_on_the_digits(here, capsys):
    path = ROOT / "docs" / "minimal.py"
    code = path.read_text()
    assert len(code.splitlines()) <= 60
    exec(compile(code.replace('"mnist", "mlp"', '"digits", "logistic"'), path, "exec"), {})
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"epoch 10  .* test accuracy 0\.[89]\d+", last)


def test_the_readme_is_short():
    lines = PAGES["README.md"].splitlines()
    before = " ".join(lines[: lines.index("```sh")])
    assert len(lines) <= 120 and len(re.sub("<.*?>", "", before).split()) <= 60
    assert "pip install '.[test]' && python -m pytest" in lines


def test_both_tutorials_show_the_same_code_and_numbers():
    assert blocks(TUTORIAL, r"\w+") == blocks(KOREAN, r"\w+")
    notebook = runpy.run_path(str(ROOT / "docs" / "make_notebooks.py"))["notebook"]
    for page in (TUTORIAL, KOREAN):
        assert (ROOT / page).with_suffix(".ipynb").read_text() == notebook(PAGES[page])
    english, korean = (sorted(re.findall(r"\d+\.\d\d(?!\d)", PAGES[p])) for p in (TUTORIAL, KOREAN))
    assert english == korean


@pytest.mark.campaign
def test_the_cells_of_the_notebook_run_one_after_another(here, capsys):
    cells = json.loads((ROOT / TUTORIAL).with_suffix(".ipynb").read_text())["cells"]
    names: dict = {}
    for code in (cell["source"] for cell in cells if cell["cell_type"] == "code"):
        code = code.replace('dataset="mnist"', 'dataset="digits", max_steps=2')
        code = code.replace("/ten", "/cells").replace('"mnist"', '"digits"')
        exec(code, names)
    out = capsys.readouterr().out
    assert out.count("test accuracy: ") == 8 and "5,259,594 parameters\n" in out


RUNS = {"logistic-tutorial": 1, "mlp-tutorial": 1, "cnn-tutorial": 5, "cnn-fast": 1, "cnn-best": 5}


@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_of_the_record(name):
    ends = ("", "-1235", "-1236", "-1237", "-1238")[: RUNS[name]]
    records = [json.loads((ROOT / f"docs/results/mnist-{name}{e}.json").read_text()) for e in ends]
    accuracy = 100 * np.hstack([record["test_accuracy"] for record in records])
    mean, sd, n = f"{accuracy.mean():.2f}", f"{accuracy.std(ddof=1):.2f}", str(len(accuracy))
    keys = {"cnn-best": "--preset=best", "cnn-tutorial": "original recipe"}
    key = keys.get(name, f"--model={name.split('-')[0]} ")
    [line] = [x for x in PAGES["README.md"].splitlines() if key in x and "±" in x]
    assert re.search(rf"{mean} ± {sd} (% )?\({n} seeds", line)
    rows = [[c.strip() for c in row.split("|")] for row in PAGES["docs/recipes.md"].splitlines()]
    model, preset = name.split("-")
    [row] = [r for r in rows if f"`{preset}`" in r and f"--model={model}" in r[-2]]
    assert {mean, sd, n} <= {*row}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^):]+)\)|<img src=\"([^\":]+)\"", PAGES[name])
    for link in map("".join, links):
        target, _, anchor = link.partition("#")
        path = Path(os.path.normpath((ROOT / name).parent / target)) if target else ROOT / name
        assert path.exists(), link
        if anchor:
            text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
            headings = [re.sub(r"[^\w\- ]", "", h) for h in re.findall(r"^#+ +(.+)$", text, re.M)]
            assert anchor in {h.strip().lower().replace(" ", "-") for h in headings}, link
