"""A run, or several side by side, as one page that needs nothing but itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_jax import atomic_io as storage
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.data.split import NUM_CLASSES
from mnist_jax.inference.compare import Predictions, predict_all
from mnist_jax.inference.restore import LoadedRun, load_run
from mnist_jax.metrics import finite_members, mean_over_members
from mnist_jax.models import count_parameters, layers, param_shapes
from mnist_jax.reporting import pictures, plots
from mnist_jax.reporting.page import Page, Table, render, write
from mnist_jax.runs import run_dir as runs
from mnist_jax.runs.statistics import binomial_ci95, confusion, percent, summarize
from mnist_jax.steps import num_batches

SAMPLES = 60  # training images for TensorBoard
RESULTS = (
    *("run", "test accuracy", "right", "95 % interval"),
    *("steps", "parameters", "training, s", "total, s"),
)
TIMINGS = {
    "import_s": "imports",
    "data_s": "loading the data",
    "compile_s": "compiling",
    "train_s": "training",
    "eval_s": "evaluating",
}


def make(
    saved: Sequence[LoadedRun], dataset: Dataset | None, *, platform: str | None = None
) -> bytes:
    """The page of one run, or of several side by side.

    Args:
        saved: the runs, complete or not.
        dataset: that of one run; of several the page shows no images.
        platform: the device that evaluates one run; None for the run's own.

    Raises:
        CheckpointError: a run's result is damaged.
        DeviceError: the platform is absent.
        NonFiniteError: the answers of the network, or of every member, are not finite.
    """
    if dataset is None or len(saved) > 1:
        return render(of_several(saved))
    (run,) = saved
    return render(of_one(run, dataset, predict_all([run], dataset, platform=platform)))


def at_start(run: runs.Run, dataset: Dataset) -> None:
    """Shows TensorBoard some of the training images."""
    image, label = dataset.train.image[:SAMPLES], dataset.train.label[:SAMPLES]
    figure = plots.samples(image, [dataset.class_names[i] for i in label])
    run.add_image("train", plots.pixels(figure), 0)


def at_end(run: runs.Run, config: Config, dataset: Dataset) -> Path | None:
    """Gives a complete run the pictures that its config asks for.

    Returns:
        The report, if it was asked for.

    Raises:
        DeviceError: a file cannot be written.
    """
    saved = load_run(run.folder)
    predictions = predict_all([saved], dataset, platform=config.platform)
    counts = confusion(predictions.probabilities.argmax(2), predictions.label, NUM_CLASSES)
    figure = plots.confusion(counts, dataset.class_names)
    run.add_image("confusion", plots.pixels(figure), saved.progress.step)
    if not config.report:
        return None
    path = run.folder / runs.REPORT
    write(path, render(of_one(saved, dataset, predictions)))
    return path


def of_one(run: LoadedRun, dataset: Dataset, predictions: Predictions) -> Page:
    """The page of one run, whose members gave the test images these probabilities."""
    config, progress = run.config, run.progress
    result = runs.read_result(run.folder)
    record = result or {}
    correct = predictions.right.sum(1).tolist()
    notices = [*run.notices, *dataset.warnings, *predictions.notices]
    if isinstance(told := record.get("notices"), list):
        notices += map(str, told)
    again = correct[0] if config.seeds is None else correct
    if record.get("test_correct", again) != again and not predictions.notices:
        told = record["test_correct"]
        notices.append(f"the run counted {told} right answers; counted again they are {again}")
    lead, said = _accuracy(run, correct, len(dataset.test.label))
    parameters = f"{count_parameters(param_shapes(run.model)):,}"
    if config.validation and dataset.validation is None:
        dataset = dataset.hold_out(config.validation)
    # Not progress.epoch, which counts the part of one that --max_steps leaves.
    epochs = progress.step // num_batches(len(dataset.train.label), config.batch_size)
    shapes = [
        (name, kind, " × ".join(map(str, shape)), f"{count:,}")
        for name, kind, shape, count in layers(run.model)
    ]
    return Page(
        title=f"{config.model} on {config.dataset}{'' if result else ', not complete'}",
        lead=lead,
        summary=[
            said,
            f"{parameters} parameters, trained for {progress.step:,} steps of {config.batch_size} "
            f"out of {len(dataset.train.label):,} images; {epochs} of {config.epochs} "
            "epochs are complete.",
            f"Folder: {run.folder}",
        ],
        notices=list(dict.fromkeys(notices)),
        results=[],
        pictures=list(pictures.of_one(run, dataset, predictions)),
        details=[
            Table(
                "Layers",
                ("layer", "kind", "output shape", "parameters"),
                [*shapes, ("total", "", "", parameters)],
                text="What an image passes through, from top to bottom.",
            ),
            _epoch_table(progress.rows),
            _time_table(record.get("timings"), progress.seconds),
            Table(
                "StepConfig",
                ("flag", "here", "usual"),
                _differences(run),
                numbers=False,
                text=f"What differs from the preset {config.preset} and the model's own values, "
                "and the command for another run like this one.",
                commands=[config.command_line()],
            ),
            Table("Environment", (), _environment(run.folder), numbers=False),
        ],
    )


def of_several(saved: Sequence[LoadedRun]) -> Page:
    """Runs side by side, by the numbers of their last evaluations."""
    models = [run.config.model for run in saved]
    names = [f"{i} {model}" for i, model in enumerate(models, start=1)]
    if len(set(models)) == len(models):
        names = models
    named = dict(zip(names, saved, strict=True))
    identities = [run.config.hyperparameters() for run in saved]
    varied = [name for name in identities[0] if len({_text(each[name]) for each in identities}) > 1]
    return Page(
        title=f"{len(saved)} runs on {saved[0].config.dataset}",
        lead="",
        summary=[],
        notices=list(dict.fromkeys(notice for run in saved for notice in run.notices)),
        results=[
            Table(
                "Results",
                RESULTS,
                [_result(name, run) for name, run in named.items()],
                text="Of one network the interval says what other test images might show; of "
                "several that differ in their seed, where the mean of many more would lie.",
            )
        ],
        pictures=list(
            pictures.of_several({name: run.progress.rows for name, run in named.items()})
        ),
        details=[
            Table(
                "Recipes",
                ("flag", *names),
                [
                    *((name, *(_text(each[name]) for each in identities)) for name in varied),
                    ("folder", *(run.folder for run in saved)),
                ],
                numbers=False,
                text="Where they differ, and a command for another run like each.",
                commands=[run.config.command_line() for run in saved],
            )
        ],
    )


def _accuracy(run: LoadedRun, correct: list[int], count: int) -> tuple[str, str]:
    """The accuracy on the test images, and a sentence about what it says."""
    if run.config.seeds is None:
        interval = _range(binomial_ci95(correct[0], count))
        return percent(correct[0] / count), (
            f"{correct[0]:,} of the {count:,} test images are classified rightly. On all images "
            f"of the same kind it is within {interval} (95 % interval)."
        )
    found = summarize([right / count for right in correct])
    more = ""
    if found["sd"] is not None:
        more = f"; standard deviation {percent(found['sd'])}, 95 % interval of the mean "
        more += _range(found["ci95"])
    seeds = run.config.all_seeds()
    of = "" if found["n"] == len(seeds) else f" of {len(seeds)}"
    return percent(found["mean"]), (
        f"The mean of {found['n']}{of} networks, with the seeds {seeds[0]} to {seeds[-1]}, on "
        f"{count:,} test images{more}; the best {percent(found['best'])}, the worst "
        f"{percent(found['worst'])}."
    )


def _result(name: str, run: LoadedRun) -> tuple[Any, ...]:
    """A run's row among several; its accuracy is that of the last evaluation."""
    progress = run.progress
    accuracy = right = interval = "-"
    if progress.rows and run.config.seeds is None:
        correct, count = progress.end["test_correct"], progress.end["test_count"]
        accuracy, right = percent(correct / count), f"{correct:,} of {count:,}"
        interval = _range(binomial_ci95(correct, count))
    elif progress.rows and (kept := finite_members(progress.rows[-1])["test/accuracy"]):
        found = summarize(kept)
        accuracy, right = percent(found["mean"]), f"mean of {found['n']} seeds"
        interval = _range(found["ci95"]) if found["ci95"] else "-"
    seconds = (runs.read_result(run.folder) or {}).get("timings", progress.seconds)
    times = [f"{seconds.get(key, 0.0):,.1f}" for key in ("train_s", "total_s")]
    parameters = f"{count_parameters(param_shapes(run.model)):,}"
    return (name, accuracy, right, interval, f"{progress.step:,}", parameters, *times)


def _epoch_table(rows: plots.Rows) -> Table:
    """Loss and accuracy after each epoch, in the mean where there are members."""
    names = [name for name in (rows[0] if rows else {}) if "/" in name]
    shown = [
        (
            row["epoch"],
            *(
                percent(mean_over_members(row, name))
                if "accuracy" in name
                else f"{mean_over_members(row, name):.4f}"
                for name in names
            ),
            f"{row['train_s']:.1f}",
        )
        for row in rows
    ]
    return Table("Epochs", ("epoch", *(name.replace("/", " ") for name in names), "s"), shown)


def _time_table(recorded: Any, so_far: dict[str, float]) -> Table:
    """Where the time went: by the result, or of a run that is not complete by its checkpoint."""
    timings = recorded if isinstance(recorded, dict) else so_far
    timings = {
        name: s for name, s in timings.items() if isinstance(s, int | float) and 0 <= s < 1e12
    }
    seconds = {text: timings.get(name, 0.0) for name, text in TIMINGS.items()}
    total = timings.get("total_s", 0.0)
    seconds["everything else"] = total - sum(seconds.values())
    rows = [
        (what, f"{s:,.1f}", f"{100 * s / max(total, 1e-9):.0f} %") for what, s in seconds.items()
    ]
    return Table("Time", ("part", "seconds", "share"), [*rows, ("total", f"{total:,.1f}", "")])


def _differences(run: LoadedRun) -> list[tuple[str, str, str]]:
    """Each field that can change a number and is not as usual: its name, its value, the usual."""
    usual = run.config.defaults().hyperparameters()
    here = run.config.hyperparameters()
    return [
        (name, _text(here[name]), _text(usual[name])) for name in here if here[name] != usual[name]
    ]


def _environment(folder: Path) -> list[tuple[str, str]]:
    """What environment.json says: its plain values, and the variables."""
    try:
        found = storage.read_json(folder / "environment.json")
    except (OSError, storage.IntegrityError) as error:
        return [("environment.json", f"cannot be read: {error}")]
    variables = found.pop("variables", None)
    found |= variables if isinstance(variables, dict) else {}
    plain = str | int | float | None
    return [(name, _text(value)) for name, value in found.items() if isinstance(value, plain)]


def _range(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{percent(low, '')} to {percent(high)}"


def _text(value: Any) -> str:
    """A field's value as its flag takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else json.dumps(value)
