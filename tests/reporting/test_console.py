"""What a run prints, on a terminal and elsewhere."""

import builtins
import io
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np

from mnist_jax.callbacks import Result
from mnist_jax.config import Config
from mnist_jax.data import Dataset, Split
from mnist_jax.metrics import NEVER, Metrics
from mnist_jax.models import MODELS
from mnist_jax.reporting import console

RECORD = {
    "model": "mlp", "dataset": "digits",
    "test_correct": 331, "test_count": 360, "params_sha256": "ab12",
    "timings": {"compile_s": 1.5, "train_s": 0.25}, "config": {"dataset": "digits"},
}  # fmt: skip
ROW = {
    "epoch": 3, "step": 45, "train/loss": 0.0123, "train/accuracy": 0.9961,
    "test/loss": 1234.5, "test/accuracy": 1.0, "train_s": 4.0, "eval_s": 0.1,
}  # fmt: skip


def begin(display, workdir, step=0, **config):
    config = Config(model="logistic", dataset="digits", epochs=10, **config).resolve()
    split = Split(np.zeros((5, 28, 28, 1), np.uint8), np.zeros(5, np.int32))
    more = tuple("0123456789"), split if config.validation else None
    dataset = Dataset("digits", split, split, "scikit-learn", (), *more)
    display.on_fit_begin(config)
    display.on_data_loaded(dataset)
    model = MODELS["logistic"]()
    display.on_train_begin(config, dataset, model, jax.devices()[:1], workdir, step)
    return display


def test_a_run_is_shown_in_lines_that_end_with_the_accuracy(tmp_path, capsys):
    display = console.Display()
    display.on_warning("a data set was replaced")
    begin(display, tmp_path, step=30, seed=7, preset="fast")
    display.on_epoch_end(ROW)
    display.on_epoch_end({**ROW, "epoch": 10})
    display.on_train_end(Result({}, {}, RECORD, tmp_path))
    out, err = capsys.readouterr()
    assert err == "warning: a data set was replaced\n"
    lines = out.splitlines()
    assert lines[0] == "data    digits: 5 train, 5 test images, scikit-learn"
    assert lines[1] == "device  cpu, float32"
    assert re.match("config  fast: epochs 10, .*, learning_rate 0.0015, seed 7$", lines[2])
    assert re.search(r"total .* 7,850", out)
    assert lines[lines.index("resumes after 30 steps") + 1 :] == [
        "loss, accuracy          train              test      time",
        "epoch  3/10   0.0123  99.61 % 1.23e+03 100.00 %     4.1 s",
        "epoch 10/10   0.0123  99.61 % 1.23e+03 100.00 %     4.1 s",
        "time    compile 1.5, train 0.2 s",
        "params  sha256 ab12",
        "model   mlp, trained on digits",
        f"files   {tmp_path}",
        f"report  python -m mnist_jax report {tmp_path}",
        "test accuracy: 91.94 % (331/360)",
    ]


def test_settings_and_an_epoch_with_validation_fit_80_columns(tmp_path, capsys):
    display = begin(console.Display(), tmp_path, validation=100, seed=7, shift=1.0)
    *lines, header = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:4])) <= 80 and lines[3] == "        shift 1.0, validation 100"
    more = {"validation/loss": 123.4567, "validation/accuracy": 1.0, "train_s": 12345.0}
    display.on_epoch_end(ROW | more)
    (line,) = capsys.readouterr().out.splitlines()
    assert max(len(header), len(line)) <= 80
    for name in ("train", "validation", "test"):  # a column ends where its name ends
        assert line[: header.index(name) + len(name)].endswith(" %")


def test_members_are_shown_by_their_mean_and_statistics(tmp_path, capsys):
    display = begin(console.Display(), tmp_path, seeds=3)
    row = {"train/loss": [1.0, None, 2.0], "train/accuracy": [0.8, 0.1, 0.6]}
    display.on_epoch_end({**ROW, **row, "test/loss": [1.0] * 3, "test/accuracy": [0.5] * 3})
    assert "1.5000  70.00 %" in capsys.readouterr().out  # without the diverged one
    found = {"n": 2, "mean": 0.5, "sd": 0.01, "ci95": [-0.1, 1.2], "best": 0.51, "worst": 0.49}
    counts = {"seeds": 2, "members": [{"seed": 1}, {"seed": 2}], "test_correct": [180, 198]}
    record = RECORD | counts | {"statistics": {"test_accuracy": found}}
    display.on_train_end(Result({}, {}, record, tmp_path))
    out = capsys.readouterr().out
    assert "test        50.00 % mean of 2 seeds, sd 1.00, 95 % interval 0.00 to 100.00\n" in out
    assert "            best 51.00, worst 49.00\n" in out
    assert out.endswith("test accuracy: 52.50 % mean of 2 seeds, sd 3.54\n")


def test_a_grid_has_a_line_for_each_point_and_no_mean(tmp_path, capsys):
    display = begin(console.Display(), tmp_path, learning_rate=(0.1, 0.2), seeds=2)
    values = {"loss": [1.0, 3.0, 5.0, 7.0], "accuracy": [0.9, 0.7, 0.5, 0.3]}
    row = {f"{split}/{name}": x for split in ("train", "test") for name, x in values.items()}
    display.on_epoch_end(ROW | row)
    one, two = capsys.readouterr().out.splitlines()[-2:]
    assert one.endswith(" s  learning_rate 0.1") and two.endswith(" s  learning_rate 0.2")
    assert "2.0000  80.00 %" in one and "6.0000  40.00 %" in two


def test_a_complete_run_is_not_repeated(tmp_path, capsys):
    (tmp_path / "report.html").touch()
    console.Display().on_train_end(Result({}, {}, RECORD, tmp_path))
    first, *_, report, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path} holds this run, complete: nothing to do"
    assert [report, last] == [f"report  {tmp_path}/report.html", "test accuracy: 91.94 % (331/360)"]


def test_a_terminal_has_a_bar_that_close_removes(tmp_path):
    written = io.StringIO()
    terminal = {"force_terminal": True, "force_interactive": True}
    display = console.Display(console.Console(file=written, width=100, **terminal))
    begin(display, tmp_path)
    metrics = Metrics(*map(np.array, ([30.0, np.nan], [90, 0], [100, 100], [NEVER, 3])))
    display.on_chunk_end(2, 50, 200, metrics, 2.0)
    display.bar.refresh()
    texts = ["loading the data", "compiling", "epoch 2/10", "50/200", "100 images/s"]
    for text in (*texts, "70 s left", "0.3000  90.00 %"):
        assert text in written.getvalue()
    display.close()
    assert written.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # shows the cursor, erases
    display.close()


def test_a_notebook_has_a_line_that_is_replaced(tmp_path, monkeypatch):
    shown = []
    output = SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    ipython = SimpleNamespace(display=lambda *_, **__: output)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    shell = type("ZMQInteractiveShell", (), {})  # by its name Rich knows a notebook
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    display = begin(console.Display(), tmp_path)
    metrics = Metrics(*map(np.array, (30.0, 90, 100, NEVER)))
    display.on_chunk_end(1, 50, 200, metrics, 2.0)
    display.on_chunk_end(1, 200, 200, metrics, 8.0)
    display.close()
    assert shown[0].startswith("loading the data") and shown[1] == "compiling"
    assert re.match(r"epoch 1/10  50/200 .* images/s", shown[2])
    assert shown[-2:] == ["evaluating", ""]
