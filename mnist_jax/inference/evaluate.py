"""Accuracy, loss and confusion matrix of a saved model on a test set."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from mnist_jax.config import GRID, member_label
from mnist_jax.data import Dataset
from mnist_jax.errors import print_warnings
from mnist_jax.inference.flags import DataFlags, RunFolder, open_runs
from mnist_jax.inference.restore import LoadedRun, Predictor, dataset_of, load_run
from mnist_jax.metrics import confusion_matrix
from mnist_jax.runs.statistics import accuracy, accuracy_text, mean_text, percent, summarize


def evaluate(
    workdir: str | Path | LoadedRun,
    *,
    dataset: str | Dataset | None = None,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    platform: str | None = None,
) -> dict[str, Any]:
    """Evaluates a run, its folder or what `load_run` read, on all test images of a data set.

    dataset, data_dir and platform: None for the run's own. manual_dir: the original files' folder.
    Errors are those of `load_run`, `load_dataset` and `Predictor`.

    Returns:
        A dict that JSON can hold: dataset and trained_on (names), correct, count, accuracy, ci95
        (Wilson) and loss (mean cross-entropy in nats) of the model, or of the mean of the members'
        probabilities; confusion, a row per label and a column per predicted class; classes, their
        names; members (seed, values of a grid, correct, count, accuracy, ci95, loss); single,
        `statistics.summarize` of the members' accuracies, None for a grid; warnings.
    """
    run = load_run(workdir)
    loaded = dataset_of(run, dataset=dataset, data_dir=data_dir, manual_dir=manual_dir)
    label, names = loaded.test.label, loaded.class_names
    found = Predictor(run, platform)(loaded.test.image)

    def score(log_probabilities: np.ndarray) -> dict[str, Any]:  # (images, classes)
        loss = -log_probabilities[np.arange(len(label)), label].mean()
        return {**accuracy(log_probabilities.argmax(1), label), "loss": float(loss)}

    pairs = zip(found.members, found.log_probabilities, strict=True)
    members = [{**member, **score(values)} for member, values in pairs]
    # Of the logarithms: probabilities may underflow.
    log_mean = scipy.special.logsumexp(found.log_probabilities, axis=0) - np.log(len(members))
    counts = confusion_matrix(log_mean.argmax(1), label, len(names))
    return {
        "dataset": loaded.name,
        "trained_on": run.data.name,
        **score(log_mean),
        "confusion": counts.tolist(),
        "classes": list(names),
        "members": members,
        "single": None if run.config.grid else summarize([m["accuracy"] for m in members]),
        "warnings": [*run.warnings, *loaded.warnings, *found.warnings],
    }


def table_lines(found: dict[str, Any]) -> list[str]:
    """The confusion matrix of `evaluate` as text: a row per label, a column per prediction."""
    rows = [["label", *map(str, range(len(found["classes"]))), "accuracy"]]
    for label, (name, counts) in enumerate(zip(found["classes"], found["confusion"], strict=True)):
        title = name if name == str(label) else f"{label} {name}"
        share = percent(counts[label] / sum(counts) if any(counts) else None)
        rows.append([title, *(str(count or ".") for count in counts), share])
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([name.ljust(first), *map(str.rjust, cells, rest)]) for name, *cells in rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(DataFlags):
    """Evaluates a saved model on the test images: accuracy, loss and confusion matrix."""

    folder: RunFolder
    """The run's folder. With --seeds=K: each network, and the mean of their probabilities."""

    dataset: str | None = None
    """Evaluate on the test images of another data set. None: the run's."""

    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> None:
        """Prints the result, warnings on stderr."""
        (run,) = open_runs([self.folder])
        folders = {"data_dir": self.data_dir, "manual_dir": self.manual_dir}
        found = evaluate(run, dataset=self.dataset, platform=self.platform, **folders)
        print_warnings(text for text in found["warnings"] if text not in run.warnings)
        if self.json:
            print(json.dumps(found))
            return
        rows = {"data": f"{found['dataset']}, {found['count']:,} test images"}
        if found["dataset"] != found["trained_on"]:
            rows["trained on"] = found["trained_on"]
        if many := len(found["members"]) > 1:
            for member in found["members"]:
                name = member_label({n: v for n, v in member.items() if n in ("seed", *GRID)})
                rows[name] = f"{accuracy_text(member)}, loss {member['loss']:.4f}"
            if found["single"]:
                rows["single"] = mean_text(found["single"], "members")
        rows["ensemble" if many else "accuracy"] = accuracy_text(found)
        rows["loss"] = f"{found['loss']:.4f}"
        lines = [f"{name:{max(map(len, rows))}}  {text}" for name, text in rows.items()]
        heading = "rows: labels; columns: predicted classes"
        print(*lines, "", heading, *table_lines(found), sep="\n")
