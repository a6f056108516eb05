"""A run on standard output: tables, a line per epoch, and on a terminal or in a notebook a bar."""

import contextlib
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table

from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config, group_by_point
from mnist_jax.data import DATASETS, Dataset
from mnist_jax.errors import print_warnings
from mnist_jax.metrics import NEVER, Metrics, member_means, select_members
from mnist_jax.models import count_parameters, layers, variable_shapes
from mnist_jax.runs.results import accuracy_line
from mnist_jax.runs.run_dir import REPORT
from mnist_jax.runs.statistics import percent, summary_text


class Display(Callback):
    """Prints a run as it happens; the last line is the accuracy."""

    def __init__(self, console: Console | None = None):
        # Rich's own bar in a notebook needs ipywidgets; a notebook has FORCE_COLOR, too.
        is_terminal = bool(sys.stdout and sys.stdout.isatty())  # a process may have no output
        plain: dict[str, Any] = {"force_jupyter": False, "force_interactive": is_terminal}
        self.console = console or Console(highlight=False, soft_wrap=True, **plain)
        columns = "{task.description}", BarColumn(bar_width=24), "{task.fields[text]}"
        hidden = not self.console.is_interactive
        self.bar = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self.task = self.bar.add_task("", total=None, text="")
        self.line: Any = None  # in a notebook, the text of an output that is replaced
        if Console().is_jupyter:
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            self.line = display({"text/plain": ""}, raw=True, display_id=True)
        self.config: Any = None  # a Config once training begins

    def on_fit_begin(self, config: Config) -> None:
        """Shows the bar."""
        self._show("loading the data; longer the first time")
        self.bar.start()

    def _show(self, description: str, text: str = "", done: int = 0, total: int = 0) -> None:
        """What the run does now; `text` stands behind the bar."""
        now = {"description": description, "text": text, "completed": done, "total": total or None}
        self.bar.update(self.task, **now)
        if self.line is not None:
            self.line.update({"text/plain": f"{description}  {text}".rstrip()}, raw=True)

    def on_warning(self, message: str) -> None:
        """Prints it on standard error."""
        print_warnings([message])

    def on_train_begin(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        devices: Sequence[jax.Device],
        workdir: Path,
        step: int,
    ) -> None:
        """Prints what is trained on what, with which device and settings."""
        self.bar.stop()
        print(f"data    {dataset}")
        print(f"device  {describe_devices(devices)}, {config.precision}")
        lines = textwrap.wrap(describe_config(config), 72, break_long_words=False)
        print("config  " + f"\n{'':8}".join(lines).replace("\xa0", " "))
        print(f"run     {workdir}")
        with self.console.capture() as table:  # Rich would exit with status 1 on a closed pipe
            self.console.print(layer_table(config.model, model))
        print(table.get(), end="")
        if step:
            print(f"resumes after {step:,} steps")
        self.config = config
        splits = ("train", *["validation"] * (dataset.validation is not None), "test")
        numbers = " " * len(f"epoch {config.epochs}/{config.epochs}")
        heads = numbers + "".join(f"{name:>18}" for name in splits)
        print(f"loss, accuracy{heads[14:]}{'time':>10}")
        self._show("compiling")
        self.bar.start()

    def on_chunk_end(
        self, epoch: int, batch: int, num_batches: int, metrics: Metrics, train_s: float
    ) -> None:
        """Moves the bar."""
        finite = np.ravel(metrics.first_nonfinite) == NEVER
        means = [np.ravel(x)[finite].mean() for x in (metrics.loss, metrics.accuracy)]
        cell = "" if self.config.grid else _cell(*means)
        rate, epochs_left = np.sum(metrics.count) / train_s, self.config.epochs - epoch
        left_s = ((1 + epochs_left) * num_batches - batch) * train_s / batch
        left = f"  {left_s:.0f} s left" if left_s < 120 else f"  {left_s / 60:.0f} min left"
        # The first steps are slow, and the last epochs may not come.
        left = "" if self.config.max_steps or train_s < 0.5 else left
        text = f"{batch}/{num_batches}{cell}  {rate:,.0f} images/s{left}"
        self._show(f"epoch {epoch}/{self.config.epochs}", text, batch, num_batches)
        if batch == num_batches:
            self._show("evaluating")

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """Prints one line; of a grid one for each point."""
        found = [name for name in ("train", "validation", "test") if f"{name}/loss" in row]
        epochs = str(self.config.epochs)
        number = f"{row['epoch']:>{len(epochs)}}/{epochs}"
        for label, indices in group_by_point(self.config.members()).items():
            means = member_means(select_members(row, indices))
            cells = "".join(_cell(means[f"{s}/loss"], means[f"{s}/accuracy"]) for s in found)
            line = f"epoch {number}{cells}{row['train_s'] + row['eval_s']:>8.1f} s  {label}"
            print(line.rstrip())
        is_last = row["epoch"] == self.config.epochs
        self._show("saving" if is_last else f"epoch {row['epoch'] + 1}/{epochs}")

    def on_train_end(self, result: Result) -> None:
        """Prints the summary, with the accuracy last."""
        self.bar.stop()
        record, folder = result.record, result.workdir
        if self.config is None:
            print(f"{folder} holds this run, complete: nothing to do")
        else:
            times = record["timings"].items()  # Python has no seconds of imports
            print("time    " + ", ".join(f"{name[:-2]} {s:.1f}" for name, s in times if s) + " s")
            for name, found in record.get("statistics", {}).items():
                lines = summary_text(found).replace("; ", f"\n{'':12}")  # within 80 columns
                print(f"{name.removesuffix('_accuracy'):11} {lines}")
            if "members" not in record:
                print(f"params  sha256 {record['params_sha256']}")
        print(f"model   {record['model']}, trained on {record['dataset']}")
        print(f"files   {folder}")
        name = record["config"]["dataset"]
        if (folder / REPORT).exists():
            print(f"report  {folder / REPORT}")
        elif name in DATASETS or Path(name).is_absolute():  # and not arrays that fit was given
            print(f"report  python -m mnist_jax report {shlex.quote(str(folder))}")
        print(accuracy_line(record), flush=True)

    def close(self) -> None:
        """Removes the bar, also after an error or Ctrl-C."""
        with contextlib.suppress(OSError):  # the terminal is gone
            self.bar.stop()
        if self.line is not None:
            self.line.update({"text/plain": ""}, raw=True)


def _cell(loss: float, accuracy: float) -> str:
    """Loss and accuracy in 18 columns."""
    return f"{loss:>9{'.4f' if loss < 1000 else '.2e'}} {percent(accuracy):>8}"


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Such as `cpu`, or `8 × gpu (NVIDIA H100) of 2 processes`."""
    processes = len({device.process_index for device in devices})
    count = f"{len(devices)} × " if len(devices) > 1 else ""
    where = f" of {processes} processes" if processes > 1 else ""
    name, kind = devices[0].platform, devices[0].device_kind
    return f"{count}{name}{f' ({kind})' * (kind != name)}{where}"


def describe_config(config: Config) -> str:
    """The preset, the main hyper-parameters, and the others that differ from the preset."""
    values, defaults = config.hyperparameters(), config.defaults().hyperparameters()
    main = ("epochs", "batch_size", "learning_rate", "seed")
    shown = (*main, "dataset", "precision")  # the last two elsewhere
    changed = [n for n in values if n not in shown and values[n] not in (None, defaults[n])]
    words = (f"{n} {values[n]}".replace(" ", "\xa0") for n in (*main, *changed))  # unbroken
    return f"{config.preset}: " + ", ".join(words)


def layer_table(name: str, model: nn.Module) -> Table:
    """Layer, output shape and parameters of a model, with their total."""
    total = f"{count_parameters(variable_shapes(model)[0]):,}"
    table = Table(title=f"model {name}", title_justify="left", show_footer=True, pad_edge=False)
    table.add_column("layer", footer="total")
    table.add_column("kind")
    table.add_column("output shape")
    table.add_column("parameters", justify="right", footer=total, min_width=len(total))
    for layer in layers(model):
        shape = " × ".join(map(str, layer.output_shape))
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}")
    return table
