"""How good a saved model is on a test set: overall, in each class, and what it takes for what."""

from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax.config import checked_path
from mnist_jax.errors import UsageError
from mnist_jax.inference.restore import Classifier, dataset_of, finite_members, load_runs, none_left
from mnist_jax.parallel import mesh as devices
from mnist_jax.runs.statistics import accuracy, confusion, summarize


def evaluate(
    workdir: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    platform: str | None = None,
) -> dict[str, Any]:
    """Evaluates a run's model on all test images of a data set.

    >>> from mnist_jax import evaluate
    >>> found = evaluate("runs/mnist-cnn")  # doctest: +SKIP
    >>> found["correct"], found["count"]  # doctest: +SKIP
    (9934, 10000)

    Args:
        workdir: the run's folder.
        dataset: one of `data.DATASETS`; None for the run's own.
        data_dir: where the data set is; None for where the run had its own.
        manual_dir: where its original files are, if it is not there.
        platform: the device that computes; None for the run's own.

    Returns:
        What JSON can hold. dataset and trained_on: the names of the data sets. correct, count,
        accuracy, ci95 (as in `statistics.accuracy`) and loss (mean cross-entropy in nats): of the
        model, or of the mean of the members' probabilities. confusion: for each label, how many of
        its images are taken for each class. classes: name, correct, count and accuracy of each
        (None without images). members: seed, correct, count, accuracy, ci95 and loss of each one;
        single: `statistics.summarize` of their accuracies. notices: what a user must be told.

    Raises:
        UsageError: the folder holds no run, the data set does not exist or has other classes.
        CheckpointError: the run cannot be used.
        DataError: the data set cannot be had.
        DeviceError: the platform is absent.
        NonFiniteError: what the model gives, or every member, is not finite.
    """
    from scipy.special import log_softmax

    folders = {
        name: None if folder is None else checked_path(name, folder)
        for name, folder in (("data_dir", data_dir), ("manual_dir", manual_dir))
    }
    (run,) = load_runs([checked_path("workdir", workdir)])
    loaded = dataset_of(run, name=dataset, **folders)
    label, names = loaded.test.label, loaded.class_names
    with devices.running_on(platform or run.config.platform, run.config.precision) as device:
        logits = Classifier(run, device, logits=True)(loaded.test.image)
    if logits.shape[2] != len(names):
        raise UsageError(
            f"{loaded.name} has {len(names)} classes, the model {logits.shape[2]}; choose another "
            "--dataset"
        )
    finite, left_out = finite_members(run, logits)
    if not finite:
        raise none_left(left_out)

    def judged(log_probabilities: np.ndarray) -> dict[str, Any]:
        of_label = log_probabilities[np.arange(len(label)), label]
        return {**accuracy(log_probabilities.argmax(1), label), "loss": float(-of_label.mean())}

    members, log_sum = [], np.full(logits.shape[1:], -np.inf)
    for seed, values in finite.items():
        log_probabilities = log_softmax(values.astype(np.float64), axis=1)
        members.append({"seed": seed, **judged(log_probabilities)})
        log_sum = np.logaddexp(log_sum, log_probabilities)
    counts = confusion(log_sum.argmax(1), label, len(names))
    return {
        "dataset": loaded.name,
        "trained_on": run.config.dataset,
        **judged(log_sum - np.log(len(finite))),
        "confusion": counts.tolist(),
        "classes": [
            {"name": name, "correct": int(row[i]), "count": int(row.sum()), "accuracy": share}
            for i, (name, row) in enumerate(zip(names, counts, strict=True))
            for share in [float(row[i] / row.sum()) if row.sum() else None]
        ],
        "members": members,
        "single": summarize([member["accuracy"] for member in members]),
        "notices": [*run.notices, *loaded.notices, *left_out],
    }
