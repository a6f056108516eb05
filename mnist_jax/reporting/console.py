"""A run as a person sees it: tables, a live bar on a terminal, one line an epoch elsewhere."""

import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Table

from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.errors import DataError
from mnist_jax.metrics import NEVER, Metrics, mean_over_members
from mnist_jax.models import count_parameters, layers, param_shapes
from mnist_jax.reporting.profiling import costliest, show_costliest
from mnist_jax.runs.results import accuracy_line
from mnist_jax.runs.statistics import percent
from mnist_jax.training import Callback, Result


class PipeConsole(Console):
    """Rich's console, which would exit with 1 where the reader of a pipe goes away."""

    def on_broken_pipe(self) -> None:
        """Leaves the decision to the command."""
        raise BrokenPipeError


class Display(Callback):
    """Shows a run on standard output."""

    def __init__(self):
        self.console = PipeConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.loading: Status | None = None
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.epochs = self.epoch = 0
        self.notices: list[str] = []
        self.began = time.time()

    def on_load(self, config: Config) -> None:
        """A sign of life on a terminal."""
        if self.console.is_terminal:
            self.loading = self.console.status(f"loading the data set {config.dataset}")
            self.loading.start()

    def on_warning(self, text: str) -> None:
        """Shows it now, and again at the end, where it is not scrolled away."""
        self.notices.append(text)
        self.console.print(f"notice: {text}", markup=False)

    def on_train_begin(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        devices: Sequence[jax.Device],
        workdir: Path,
    ) -> None:
        """What runs on what, and the table of layers."""
        self.close()
        train, test = len(dataset.train.label), len(dataset.test.label)
        limit = f", at most {config.max_steps:,} steps" if config.max_steps else ""
        epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
        rows = {
            "data": f"{dataset.name}, {train:,} train and {test:,} test images, {dataset.source}",
            "device": f"{_named(devices)}, {config.precision}",
            "recipe": f"{config.preset}: {epochs}{limit}, batch {config.batch_size}, "
            f"Adam {config.learning_rate:g}{_extras(config)}, {_seeds(config)}",
            "run": f"{workdir}",
        }
        for name, text in rows.items():
            self.console.print(f"{name:8s}{text}", markup=False)
        self.console.print(layer_table(config.model, model))
        self.epochs = config.epochs
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.progress.add_task("compiling", total=None, text="")
            self.progress.start()

    def on_resume(self, step: int) -> None:
        """Where the run goes on."""
        self.console.print(f"resumed after {step:,} steps")

    def on_chunk_end(
        self, epoch: int, step: int, last_step: int, sums: Metrics, train_s: float
    ) -> None:
        """Moves the bar."""
        if self.progress is None or self.task is None:
            return
        if epoch != self.epoch:
            text = "compiling" if self.epoch == 0 else ""
            self.progress.reset(self.task, total=last_step, completed=step, text=text)
            self.progress.update(self.task, description=f"epoch {epoch}/{self.epochs}")
            self.epoch = epoch
            return
        rate, left_s = int(np.sum(sums.count)) / train_s, (last_step - step) * train_s / step
        kept = np.ravel(sums.first_nonfinite) == NEVER  # of an ensemble: members that are not lost
        means = (
            np.ravel(x)[kept].mean() if kept.any() else math.nan for x in (sums.loss, sums.accuracy)
        )
        text = (
            f"{step}/{last_step}  {rate:,.0f} images/s  {left_s:.0f} s left  "
            f"{_loss_and_accuracy(*means)}"
        )
        self.progress.update(self.task, completed=step, text=text)
        self.progress.refresh()

    def on_epoch_end(self, row: dict[str, Any]) -> None:
        """One line an epoch."""
        found = "".join(
            f"{name} "
            + _loss_and_accuracy(
                *(mean_over_members(row, f"{name}/{m}") for m in ("loss", "accuracy"))
            )
            + "  "
            for name in ("train", "validation", "test")
            if f"{name}/loss" in row
        )
        self.console.print(
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  {found}"
            f"{row['train_s']:.1f} s, test {row['eval_s']:.1f} s, "
            f"{row['images_per_s']:,.0f} images/s"
        )

    def on_train_end(self, result: Result) -> None:
        """The summary, ending in the accuracy."""
        self.close()
        record = result.record
        if result.params is None:
            print(f"{result.workdir} holds this run, complete: nothing to do")
        else:
            parts = "  ".join(f"{name[:-2]} {s:.1f} s" for name, s in record["timings"].items())
            print(f"time    {parts}")
            if "statistics" in record:
                self.console.print(statistics_table(record))
            else:
                print(f"params  sha256 {record['params_sha256']}")
            print(f"files   {result.workdir}")
            if folder := record["config"]["profile"]:
                self._show_profile(Path(folder))
            for text in self.notices:
                print(f"notice  {text}")
        make = f"python -m mnist_jax report {shlex.quote(str(result.workdir))}"
        print(f"report  {result.report or make}")
        print(accuracy_line(record), flush=True)

    def _show_profile(self, folder: Path) -> None:
        print(f"profile {folder}")
        try:
            show_costliest(costliest(folder, since=self.began), self.console)
        except DataError:
            self.notices.append(
                "nothing was profiled: the run has no second call, or none of --profile_steps"
            )

    def close(self) -> None:
        """Takes the bar away, also when the run ends early."""
        for live in (self.loading, self.progress):
            if live is not None:
                live.stop()


def _named(devices: Sequence[jax.Device]) -> str:
    """Such as `cpu (cpu)`, or `8 × gpu (NVIDIA H100) of 2 processes`."""
    processes = len({device.process_index for device in devices})
    times = f"{len(devices)} × " * (len(devices) > 1)
    of = f" of {processes} processes" * (processes > 1)
    return f"{times}{devices[0].platform} ({devices[0].device_kind}){of}"


def _loss_and_accuracy(loss: float, accuracy: float) -> str:
    """Four decimals; a loss that has exploded in powers of ten."""
    shown = f"{loss:.3e}" if loss >= 1e4 else f"{loss:.4f}"
    return f"loss {shown} accuracy {accuracy:.4f}"


def _extras(config: Config) -> str:
    """What a recipe has beyond the tutorial's that the rest of the summary does not say."""
    said = {"dataset", "preset", "epochs", "batch_size", "learning_rate", "seed", "seeds"}
    said |= {"hidden_sizes", "precision", "max_steps"}
    plain = Config(model=config.model).hyperparameters()
    return "".join(
        f", {name} {value}"
        for name, value in config.hyperparameters().items()
        if name not in said and value != plain[name]
    )


def _seeds(config: Config) -> str:
    seeds = config.all_seeds()
    return f"seed {seeds[0]}" if config.seeds is None else f"seeds {seeds[0]} to {seeds[-1]}"


def statistics_table(record: dict[str, Any]) -> Table:
    """Mean, spread and extremes of the accuracies of an ensemble's members, in percent."""
    table = Table(title="accuracy, % of images", title_justify="left", pad_edge=False)
    for heading in ("images", "seeds", "mean", "sd", "95 % interval of the mean", "best", "worst"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    for name, found in record["statistics"].items():
        interval = " to ".join(percent(end, "") for end in found["ci95"] or ())
        cells = [percent(found[key], "") for key in ("mean", "sd")]
        ends = [percent(found[key], "") for key in ("best", "worst")]
        image = name.removesuffix("_accuracy")
        table.add_row(image, str(found["n"]), *cells, interval or "-", *ends)
    return table


def layer_table(name: str, model: nn.Module) -> Table:
    """Layer, output shape and parameters of a model, with the totals below."""
    rows = layers(model)
    total = count_parameters(param_shapes(model))
    table = Table(title=f"model {name}", title_justify="left", show_footer=True, pad_edge=False)
    table.add_column("layer", footer="total\ntrainable\nnon-trainable")
    table.add_column("kind")
    table.add_column("output shape")
    table.add_column("parameters", justify="right", footer=f"{total:,}\n{total:,}\n0")
    for layer in rows:
        shape = " × ".join(str(n) for n in layer.output_shape)
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}")
    return table
