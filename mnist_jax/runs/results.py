"""A run's results as JSON: the lines of metrics.jsonl, and result.json."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnist_jax.config import Config
from mnist_jax.metrics import Metrics, finite_mask
from mnist_jax.models import count_parameters
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import Progress, names_of
from mnist_jax.runs.statistics import percent, summarize


def metrics_row(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """Loss and accuracy of each split, such as "test/loss"; None for a loss that is not finite."""
    row: dict[str, Any] = {}
    for name, metrics in found.items():
        loss = np.asarray(metrics.loss)
        row[f"{name}/loss"] = np.where(np.isfinite(loss), loss, np.array(None)).tolist()
        row[f"{name}/accuracy"] = metrics.accuracy
    return row


def evaluation(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """The accuracy of each split, and the counts of all but the training split."""
    values: dict[str, Any] = {}
    for name, metrics in found.items():
        values[f"{name}_accuracy"] = metrics.accuracy
        if name != "train":
            values[f"{name}_correct"] = np.asarray(metrics.correct).tolist()
            values[f"{name}_count"] = int(np.max(metrics.count))
    return values


def diverged_warning(seed: int) -> str:
    """The warning for a member whose loss or gradient became NaN or infinite."""
    return f"seed {seed} diverged: its loss is not finite; the statistics exclude it"


def record(
    config: Config,
    progress: Progress,
    warnings: Sequence[str],
    devices: Sequence[jax.Device],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The content of result.json; `progress` is the final one, with NumPy arrays."""
    params = progress.state.params
    common = {
        "model": config.model,
        "dataset": config.dataset,
        "parameters": count_parameters(params) // (config.seeds or 1),
        "epochs": progress.epoch,
        "steps": progress.step,
        "seed": config.seed,
        **progress.evaluation,
        "timings": progress.seconds,
        "warnings": list(warnings),
        "devices": list(map(str, devices)),
        "config": config.to_json(),
        "environment": environment,
    }
    if config.seeds is None:
        return {**common, "params_sha256": params_sha256(params)}
    finite = finite_mask(progress.rows[-1])
    diverged = [seed for seed, ok in zip(config.all_seeds(), finite, strict=True) if not ok]
    return {
        **common,
        "seeds": config.seeds,
        "params_sha256": [params_sha256(member_of(params, m)) for m in range(config.seeds)],
        "statistics": {
            name: summarize(np.array(values)[finite].tolist())
            for name, values in progress.evaluation.items()
            if name.endswith("_accuracy")
        },
        "diverged_seeds": diverged,
        "warnings": [*warnings, *map(diverged_warning, diverged)],
    }


def accuracy_line(record: dict[str, Any]) -> str:
    """The last line of a run: `test accuracy: 92.55 % (9255/10000)`."""
    correct, count = record["test_correct"], record["test_count"]
    if "statistics" in record:
        summary = record["statistics"]["test_accuracy"]
        sd = "" if summary["sd"] is None else f", sd {percent(summary['sd'], '')}"
        return f"test accuracy: {percent(summary['mean'])} mean of {summary['n']} seeds{sd}"
    return f"test accuracy: {percent(correct / count)} ({correct}/{count})"


def params_sha256(params: Any) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(names_of(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
