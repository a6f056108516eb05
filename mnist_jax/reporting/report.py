"""The HTML report of a run, or of several side by side: one file that needs no network."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure

from mnist_jax import atomic_io
from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config, group_by_point, member_label
from mnist_jax.data import Dataset
from mnist_jax.errors import first_line, print_warnings, writing
from mnist_jax.inference.flags import DataFlags, Runs, open_runs
from mnist_jax.inference.restore import LoadedRun, Prediction, Predictor, dataset_of, load_run
from mnist_jax.metrics import confusion_matrix, finite_members, select_members
from mnist_jax.models import count_parameters, layers, variable_shapes
from mnist_jax.reporting import plots
from mnist_jax.runs import statistics
from mnist_jax.runs.run_dir import REPORT, read_environment
from mnist_jax.runs.statistics import accuracy_text, percent, summary_text

ERRORS = 24  # misclassified images shown
UNITS = 64  # units of the first layer shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(DataFlags):
    """Writes a page with the curves, errors, weights and times of a run, or compares several."""

    runs: Runs
    """The runs' folders, complete or not."""

    output: Path | None = None
    """The page's file. None: report.html, in the folder of one run or in the current folder."""

    def run(self) -> None:
        """Writes the page and prints its path."""
        runs = open_runs(self.runs)
        if len(runs) == 1:
            dataset = dataset_of(runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir)
            folder, page = runs[0].folder, run_page(runs[0], dataset, self.platform)
        else:
            folder, page = Path(), comparison_page(runs)
        output = atomic_io.user_path(self.output or folder / REPORT)
        write_page(output, page)
        print(f"report: {output}")


class ReportWriter(Callback):
    """Writes report.html into the run's folder at the end; a failure is only a warning."""

    def on_data_loaded(self, dataset: Dataset) -> None:
        """Keeps the data set for the report."""
        self._dataset = dataset

    def on_train_end(self, result: Result) -> None:
        """Writes the page."""
        try:
            page = run_page(load_run(result.workdir), self._dataset)
            write_page(result.workdir / REPORT, page)
        except Exception as error:  # of any kind: the run is complete
            print_warnings([f"no report was written: {first_line(error) or type(error).__name__}"])


class ReportFigure(NamedTuple):
    """A figure with its heading and caption; `name` is a word for a file."""

    name: str
    heading: str
    figure: Figure
    caption: str
    has_photos: bool = False  # in colours that dark mode leaves alone

    @property
    def is_wide(self) -> bool:
        """Whether it needs the page's full width."""
        return self.figure.get_figwidth() > plots.WIDTH

    @property
    def uri(self) -> str:
        """The figure as a data URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(plots.svg(self.figure)).decode()}"


class Table(NamedTuple):
    """A table of text or numbers, with shell commands below it."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    commands: Sequence[str] = ()
    numbers: bool = True  # aligns all columns but the first to the right


def write_page(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the values of page.html, all of them escaped, as an HTML file; raises DeviceError."""
    loader = jinja2.PackageLoader("mnist_jax", "reporting")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    html = environment.get_template("page.html").render(content)
    with writing(path, "--output"):
        atomic_io.write_atomically(path, html.encode("utf-8", "replace"))


def run_page(run: LoadedRun, dataset: Dataset, platform: str | None = None) -> dict[str, Any]:
    """The content of the page of one run."""
    config, record, label = run.config, run.record or {}, dataset.test.label
    prediction = Predictor(run, platform)(dataset.test.image)
    answers, points = prediction.log_probabilities.argmax(2), _grid_points({"": run})
    found = statistics.summarize((answers == label).mean(1).tolist())  # of the members
    accuracy, sentence = percent(found["mean"]), summary_text(found)
    if config.grid:
        accuracy = f"{percent(found['worst'], '')} to {percent(found['best'])}"
        sentence = f"{accuracy} from the worst to the best of {found['n']} networks"
    elif config.num_members is None:
        sentence = accuracy_text(statistics.accuracy(answers[0], label))
    epochs = f"epochs: {record['epochs']}" if record else f"of {config.epochs} epochs"
    training = (
        f"{count_parameters(variable_shapes(run.model)[0]):,} parameters, trained for "
        f"{run.step:,} steps with batches of {config.batch_size} images ({epochs})."
    )
    shapes = [
        (name, kind, " × ".join(map(str, shape)), f"{count:,}")
        for name, kind, shape, count in layers(run.model)
    ]
    warnings = [*run.warnings, *dataset.warnings, *prediction.warnings, *record.get("warnings", [])]
    times = [(name[:-2], f"{s:,.1f}") for name, s in run.seconds.items()]
    configs = {"this run": config, f"preset {config.preset}": config.defaults()}
    environment = read_environment(run.folder)
    environment |= environment.pop("variables", {})
    figures = [curves_figure({name: p.rows for name, p in points.items()})] if run.rows else []
    if not config.grid:
        figures += confusion_figures(dataset, prediction)
        figures += weights_figures(run, prediction.members[0])
    return {
        "title": f"{config.model} on {run.data.name}{'' if record else ', not complete'}",
        "accuracy": accuracy,
        "summary": [f"Test images: {sentence}.", training, f"Folder: {run.folder}"],
        "warnings": list(dict.fromkeys(warnings)),
        "results": [_result_table(points)] if config.grid else [],
        "figures": figures,
        "details": [
            Table("Layers", ("layer", "kind", "output shape", "parameters"), shapes),
            Table("Time", ("part", "seconds"), times),
            _config_table(configs, [config.command_line()]),
            Table("Environment", (), list(environment.items()), numbers=False),
        ],
    }


def comparison_page(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """The content of the page of several runs, from the numbers in their folders."""
    models = [run.config.model for run in runs]
    names = [f"{i} {m}" if models.count(m) > 1 else m for i, m in enumerate(models, start=1)]
    named = dict(zip(names, runs, strict=True))
    points, figures = _grid_points(named), []
    warnings = {n: [*r.warnings, *(r.record or {}).get("warnings", [])] for n, r in named.items()}
    if curves := {name: run.rows for name, run in points.items() if run.rows}:
        caption = "One point per epoch. The time is that of training, of all networks of a run."
        time = "time", "Accuracy against training time", plots.accuracy_against_time(curves)
        figures = [curves_figure(curves), ReportFigure(*time, caption)]
    commands = [run.config.command_line() for run in runs]
    return {
        "title": f"{len(runs)} runs on {runs[0].data.name}",
        "summary": [f"{name}: {run.folder}" for name, run in named.items()],
        "warnings": [f"{name}: {text}" for name in warnings for text in warnings[name]],
        "results": [_result_table(points)],
        "figures": figures,
        "details": [_config_table({name: run.config for name, run in named.items()}, commands)],
    }


def _grid_points(runs: Mapping[str, LoadedRun]) -> dict[str, LoadedRun]:
    """The runs with the rows of one grid point each, by the names of the run and the point."""
    points = {}
    for name, run in runs.items():
        for label, indices in group_by_point(run.config.members()).items():
            rows = [select_members(row, indices) for row in run.rows]
            points[f"{name} {label}".strip()] = run._replace(rows=rows)
    return points


def curves_figure(runs: Mapping[str, plots.Rows]) -> ReportFigure:
    """Loss and accuracy by epoch."""
    caption = "Train is measured during an epoch, with dropout and augmentation; test after it."
    if any(np.size(rows[0]["test/loss"]) > 1 for rows in runs.values()):
        caption += " Lines are means over the seeds; the shade spans all of them."
    return ReportFigure("curves", "Learning curves", plots.learning_curves(runs), caption)


def confusion_figures(dataset: Dataset, prediction: Prediction) -> list[ReportFigure]:
    """The confusion matrix over all members, and the most confident errors of their mean."""
    names, label, mean = dataset.class_names, dataset.test.label, prediction.mean
    members = len(prediction.members)
    counts = confusion_matrix(prediction.log_probabilities.argmax(2), label, len(names))
    errors, of = counts.sum() - counts.trace(), f" of {members} networks together" * (members > 1)
    caption = f"Test images by true class and by answer: {errors:,} errors{of}. Cells with more of "
    caption += "them have a stronger colour."
    matrix = plots.confusion_matrix(counts, names)
    figures = [ReportFigure("confusion", "Confusion matrix", matrix, caption)]
    wrong = np.flatnonzero(mean.argmax(1) != label)
    places = wrong[np.argsort(-mean[wrong].max(1), kind="stable")[:ERRORS]]
    if len(places):
        arrow = "\n→ " if max(map(len, names)) > 2 else " → "
        titles = [
            f"{names[label[i]]}{arrow}{names[mean[i].argmax()]}\n{percent(mean[i].max())}"
            for i in places
        ]
        worst = plots.samples(dataset.test.image[places], titles, columns=6)
        caption = "Test images with a wrong answer: true class → answer, and its probability"
        caption += f", the mean of {members} networks." if members > 1 else "."
        in_colour = dataset.test.image.shape[-1] == 3
        figures.append(ReportFigure("errors", "Most confident errors", worst, caption, in_colour))
    return figures


def weights_figures(run: LoadedRun, member: dict[str, Any]) -> list[ReportFigure]:
    """The first layer's weights for each class or for some units, if the layer takes pixels."""
    params, _ = run.members[run.config.members().index(member)]
    height, width, _ = run.data.image_shape
    layer = next((layer.name for layer in layers(run.model) if layer.parameters), "")
    kernel = np.asarray(params.get(layer, {}).get("kernel", 0.0))
    if kernel.ndim == 4 and kernel.shape[2] == 1:  # (height, width, 1, units)
        tiles = np.moveaxis(kernel[:, :, 0], 2, 0)
    elif kernel.ndim == 2 and len(kernel) == height * width:  # (pixels, units)
        tiles = kernel.T.reshape(-1, height, width)
    else:
        return []
    if layer == "logits":
        figure = plots.weights(tiles, run.data.class_names, columns=5)
        caption = "Pixel weights of each class"
    else:
        figure = plots.weights(tiles[:UNITS])
        some = f"{UNITS} of " if len(tiles) > UNITS else ""
        caption = f"{some}{len(tiles)} {'filters' if kernel.ndim == 4 else 'units'} of {layer}"
    caption += "" if run.config.num_members is None else f", {member_label(member)}"
    caption += ". Blue is positive, red negative; the largest 0.5 % have the strongest colour."
    return [ReportFigure("weights", "Weights of the first layer", figure, caption)]


def _result_table(points: Mapping[str, LoadedRun]) -> Table:
    """The last evaluation of each run or grid point, its size and its time."""
    rows = []
    for name, run in points.items():
        accuracies = finite_members(run.rows[-1])["test/accuracy"] if run.rows else []
        found = statistics.summarize(accuracies)
        accuracy = percent(found["mean"]), percent(found["sd"], ""), found["n"]
        size = f"{run.step:,}", f"{count_parameters(variable_shapes(run.model)[0]):,}"
        times = (f"{run.seconds.get(key, 0.0):,.1f}" for key in ("train_s", "total_s"))
        rows.append((name, *accuracy, *size, *times))
    columns = "run", "test accuracy", "sd", "seeds", "steps", "parameters"
    shared = "; the points of a grid share its time" * any(r.config.grid for r in points.values())
    return Table(f"Results{shared}", (*columns, "training, s", "total, s"), rows)


def _config_table(columns: Mapping[str, Config], commands: Sequence[str]) -> Table:
    """The flags that differ between the columns, and the commands."""
    values = [config.hyperparameters() for config in columns.values()]
    varied = [name for name in values[0] if any(v[name] != values[0][name] for v in values)]
    rows = [(name, *(v[name] for v in values)) for name in varied]
    heading = "Flags that differ, and the command to repeat a run"
    return Table(heading, ("flag", *columns), rows, commands, numbers=False)
