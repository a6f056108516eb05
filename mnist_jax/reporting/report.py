"""The HTML report of a run, or of several side by side: one file that needs no network."""

import base64
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure

from mnist_jax import atomic_io
from mnist_jax.callbacks import Callback, Result
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError
from mnist_jax.inference import restore
from mnist_jax.inference.compare import predict_all
from mnist_jax.inference.flags import DataFlags, Runs
from mnist_jax.inference.restore import LoadedRun, Prediction
from mnist_jax.metrics import finite_members, mean_over_members
from mnist_jax.models import count_parameters, layers, param_shapes
from mnist_jax.parallel.mesh import enable_compilation_cache
from mnist_jax.reporting import plots
from mnist_jax.runs import statistics
from mnist_jax.runs.run_dir import REPORT, read_result
from mnist_jax.runs.statistics import percent

ERRORS = 24  # misclassified images shown
DENSE_UNITS, FILTERS = 32, 64  # units of the first layer shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(DataFlags):
    """Writes a page with the curves, errors, weights and times of a run, or compares several."""

    runs: Runs
    """The runs' folders, complete or not."""

    output: Path | None = None
    """The page's file. None: report.html, in the folder of one run or in the current folder."""

    def run(self) -> None:
        """Writes the page and prints its path."""
        if not self.runs:
            raise UsageError("no run is named; name the folders of one or more")
        alone = len(self.runs) == 1
        default = (self.runs[0] if alone else Path()) / REPORT
        output = atomic_io.user_path(self.output or default)
        runs = restore.load_runs(self.runs)
        if alone:
            enable_compilation_cache(runs[0].config.compilation_cache)
            dataset = restore.dataset_of(
                runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir
            )
            page = run_page(runs[0], dataset, predict_all(runs, dataset, platform=self.platform))
        else:
            page = comparison_page(runs)
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
            run = restore.load_run(result.workdir)
            page = run_page(run, self._dataset, predict_all([run], self._dataset))
            write_page(result.workdir / REPORT, page)
        except (MnistJaxError, OSError) as error:
            print(f"warning: no report was written: {error}", file=sys.stderr)


class ReportFigure(NamedTuple):
    """A figure with its heading and caption; `name` is a word for a file."""

    name: str
    heading: str
    figure: Figure
    caption: str

    @property
    def uri(self) -> str:
        """The figure as a data URI."""
        return f"data:image/svg+xml;base64,{base64.b64encode(plots.svg(self.figure)).decode()}"


class Table(NamedTuple):
    """A table of text or numbers, with shell commands below it."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""
    commands: Sequence[str] = ()
    numbers: bool = True  # aligns all columns but the first to the right


def write_page(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the values of page.html, all of them escaped, as an HTML file.

    Raises:
        DeviceError: the file cannot be written.
    """
    loader = jinja2.PackageLoader("mnist_jax", "reporting")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    html = environment.get_template("page.html").render(content)
    try:
        atomic_io.write_atomically(path, html.encode("utf-8", "replace"))
    except OSError as error:
        raise DeviceError(f"cannot write {path} ({error.strerror}); choose another file") from error


def confusion_counts(prediction: Prediction, dataset: Dataset) -> np.ndarray:
    """The confusion matrix (classes, classes) of the test images, over all members."""
    predicted = prediction.probabilities.argmax(2)
    return statistics.confusion(predicted, dataset.test.label, len(dataset.class_names))


def run_page(run: LoadedRun, dataset: Dataset, prediction: Prediction) -> dict[str, Any]:
    """The content of the page of one run."""
    config, record = run.config, read_result(run.folder) or {}
    right = (prediction.probabilities.argmax(2) == dataset.test.label).sum(1).tolist()
    accuracy, sentence = describe_accuracy(run, right, len(dataset.test.label))
    recorded = record.get("warnings", [])
    warnings = [*run.warnings, *dataset.warnings, *prediction.warnings, *recorded]
    size, images = count_parameters(param_shapes(run.model)), len(dataset.train.label)
    images -= config.validation if dataset.validation is None else 0
    training = (
        f"{size:,} parameters, trained for {run.step:,} steps of {config.batch_size} out of "
        f"{images:,} images ({config.epochs} epochs planned)."
    )
    timings = record.get("timings", run.seconds)
    times = [(name[:-2], f"{s:,.1f}") for name, s in timings.items()]
    configs = {"this run": config, f"preset {config.preset}": config.defaults()}
    return {
        "title": f"{config.model} on {config.dataset}{'' if record else ', not complete'}",
        "accuracy": accuracy,
        "summary": [sentence, training, f"Folder: {run.folder}"],
        "warnings": list(dict.fromkeys(warnings)),
        "figures": run_figures(run, dataset, prediction),
        "details": [
            _layer_table(run),
            _epoch_table(run.rows),
            Table("Time", ("part", "seconds"), times),
            _config_table(configs, [config.command_line()]),
            _environment_table(run.folder),
        ],
    }


def comparison_page(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """The content of the page of several runs, from the numbers in their folders."""
    named = {f"{i} {run.config.model}": run for i, run in enumerate(runs, start=1)}
    commands = [run.config.command_line() for run in runs]
    return {
        "title": f"{len(runs)} runs on {runs[0].config.dataset}",
        "summary": [f"{name}: {run.folder}" for name, run in named.items()],
        "warnings": list(dict.fromkeys(warning for run in runs for warning in run.warnings)),
        "results": [_result_table(named)],
        "figures": comparison_figures({name: run.rows for name, run in named.items() if run.rows}),
        "details": [_config_table({name: run.config for name, run in named.items()}, commands)],
    }


def run_figures(run: LoadedRun, dataset: Dataset, prediction: Prediction) -> list[ReportFigure]:
    """Curves, confusion matrix, errors, weights and calibration of one run."""
    names, label, mean = dataset.class_names, dataset.test.label, prediction.mean
    members = len(prediction.seeds)
    figures = [curves_figure({run.config.model: run.rows})] if run.rows else []
    figures.append(confusion_figure(confusion_counts(prediction, dataset), names, members))
    places = statistics.most_confident_errors(mean, label, ERRORS)
    if len(places):
        worst = plots.worst_errors(dataset.test.image[places], label[places], mean[places], names)
        caption = "Misclassified test images: label → prediction, with its probability"
        caption += f", the mean of {members} networks." if members > 1 else "."
        figures.append(ReportFigure("errors", "Most confident errors", worst, caption))
    figures += weights_figures(run, prediction.seeds[0], names)
    bins = statistics.calibration_bins(prediction.probabilities, label)
    caption = (
        "Accuracy by predicted probability. The dashed line is perfect calibration; points below "
        "it are overconfident. Vertical lines are 95 % intervals. The calibration error is the "
        "mean distance from the dashed line, weighted by images."
    )
    diagram = plots.reliability(bins, members)
    return [*figures, ReportFigure("reliability", "Calibration", diagram, caption)]


def comparison_figures(runs: Mapping[str, plots.Rows]) -> list[ReportFigure]:
    """Curves, and accuracy against time, of runs with at least one epoch each."""
    if not runs:
        return []
    figure = plots.accuracy_against_time(runs)
    caption = "One point per epoch, without compiling and evaluating; the time is logarithmic."
    time = ReportFigure("time", "Accuracy against training time", figure, caption)
    return [curves_figure(runs), time]


def curves_figure(runs: Mapping[str, plots.Rows]) -> ReportFigure:
    """Loss and accuracy by epoch."""
    caption = "Train is measured during an epoch, with dropout if there is any; test after it."
    if any(isinstance(rows[0]["test/loss"], list) for rows in runs.values()):
        caption += " Lines are means over the seeds; their range is shaded."
    return ReportFigure("curves", "Learning curves", plots.learning_curves(runs), caption)


def confusion_figure(counts: np.ndarray, names: Sequence[str], members: int) -> ReportFigure:
    """The confusion matrix."""
    errors = counts * (1 - np.eye(len(counts), dtype=int))
    true, predicted = divmod(int(errors.argmax()), len(counts))
    caption = f"Test images by true and predicted class: {errors.sum():,} errors"
    caption += f" of {members} networks" if members > 1 else ""
    if errors.any():
        caption += f", most often {names[true]} classified as {names[predicted]}"
    figure = plots.confusion_matrix(counts, names)
    return ReportFigure("confusion", "Confusion matrix", figure, f"{caption}.")


def weights_figures(run: LoadedRun, seed: int, names: Sequence[str]) -> list[ReportFigure]:
    """The first layer's weights for each class or for some units, if the layer takes pixels."""
    params = run.members[run.config.all_seeds().index(seed)]
    layer = next((layer.name for layer in layers(run.model) if layer.parameters), "")
    kernel = np.asarray(params.get(layer, {}).get("kernel", 0.0))
    if kernel.ndim == 4 and kernel.shape[2] == 1:  # (height, width, 1, units)
        tiles, most = np.moveaxis(kernel[:, :, 0], 2, 0), FILTERS
    elif kernel.ndim == 2 and len(kernel) == 28 * 28:  # (pixels, units)
        tiles, most = kernel.T.reshape(-1, 28, 28), DENSE_UNITS
    else:
        return []
    if layer == "logits":
        figure, caption = plots.weights(tiles, names, columns=5), "Pixel weights of each class"
    else:
        figure = plots.weights(tiles[:most])
        caption = f"{min(most, len(tiles))} of {len(tiles)} units of {layer}"
    caption += "" if run.config.seeds is None else f", seed {seed}"
    caption += ". Blue is positive, red negative; the largest 0.5 % are clipped."
    return [ReportFigure("weights", "Weights of the first layer", figure, caption)]


def describe_accuracy(run: LoadedRun, correct: list[int], count: int) -> tuple[str, str]:
    """The test accuracy and a sentence with its interval; `correct` counts for each member."""
    if run.config.seeds is None:
        interval = _interval(statistics.binomial_ci95(correct[0], count))
        sentence = f"{correct[0]:,} of {count:,} test images are classified correctly"
        return percent(correct[0] / count), f"{sentence} (95 % interval {interval})."
    found = statistics.summarize([each / count for each in correct])
    seeds = run.config.all_seeds()
    sentence = f"The mean of {found['n']} of the {len(seeds)} seeds {seeds[0]} to {seeds[-1]}"
    if found["sd"] is not None:
        interval = _interval(found["ci95"])
        sentence += f"; sd {percent(found['sd'])}, 95 % interval of the mean {interval}"
    sentence += f"; best {percent(found['best'])}, worst {percent(found['worst'])}."
    return percent(found["mean"]), sentence


def _result_table(runs: Mapping[str, LoadedRun]) -> Table:
    """The last evaluation of each run, its size and its time."""
    rows = []
    for name, run in runs.items():
        record = read_result(run.folder) or {}
        accuracies = finite_members(run.rows[-1])["test/accuracy"] if run.rows else []
        found = statistics.summarize(accuracies)
        interval = found["ci95"]
        if run.config.seeds is None and record:
            interval = statistics.binomial_ci95(record["test_correct"], record["test_count"])
        accuracy = percent(found["mean"]), _interval(interval) if interval else "-", found["n"]
        size = f"{run.step:,}", f"{count_parameters(param_shapes(run.model)):,}"
        seconds = record.get("timings", run.seconds)
        times = (f"{seconds.get(key, 0.0):,.1f}" for key in ("train_s", "total_s"))
        rows.append((name, *accuracy, *size, *times))
    columns = "run", "test accuracy", "95 % interval", "seeds", "steps", "parameters"
    text = "The interval of one network is over test images; that of several seeds is of the mean."
    return Table("Results", (*columns, "training, s", "total, s"), rows, text)


def _layer_table(run: LoadedRun) -> Table:
    rows = [
        (name, kind, " × ".join(map(str, shape)), f"{count:,}")
        for name, kind, shape, count in layers(run.model)
    ]
    return Table("Layers", ("layer", "kind", "output shape", "parameters"), rows)


def _epoch_table(rows: plots.Rows) -> Table:
    """Loss and accuracy of each epoch; of an ensemble the means."""
    names = [name for name in (rows[0] if rows else {}) if "/" in name]
    shown = []
    for row in rows:
        means = {name: mean_over_members(row, name) for name in names}
        cells = (percent(x) if "accuracy" in name else f"{x:.4f}" for name, x in means.items())
        shown.append((row["epoch"], *cells, f"{row['train_s']:.1f}"))
    return Table("Epochs", ("epoch", *(name.replace("/", " ") for name in names), "s"), shown)


def _config_table(columns: Mapping[str, Config], commands: Sequence[str]) -> Table:
    """The flags that differ between the columns."""
    values = [config.hyperparameters() for config in columns.values()]
    varied = [name for name in values[0] if any(v[name] != values[0][name] for v in values)]
    rows = [(name, *(_text(v[name]) for v in values)) for name in varied]
    text = "Flags that differ, and the command to repeat a run."
    return Table("Configuration", ("flag", *columns), rows, text, commands, numbers=False)


def _environment_table(folder: Path) -> Table:
    found = atomic_io.read_json(folder / "environment.json")
    found |= found.pop("variables", {})
    rows = [(name, _text(value)) for name, value in found.items()]
    return Table("Environment", (), rows, numbers=False)


def _interval(interval: Sequence[float]) -> str:
    return f"{percent(interval[0], '')} to {percent(interval[1])}"


def _text(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value)
