"""What a run's metrics.jsonl and result.json hold; `run_dir` writes them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mnist_jax.config import Config, group_by_point, member_label
from mnist_jax.data import DataSpec
from mnist_jax.metrics import Metrics, finite_mask
from mnist_jax.models import count_parameters
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import Progress, flatten
from mnist_jax.runs.statistics import mean_text, percent, summarize


def evaluation(found: Mapping[str, Metrics]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of an epoch by split, for a line of metrics.jsonl and for result.json.

    The line has each loss, None if it is not finite, and accuracy, such as "test/loss". The result
    has the accuracies, and the counts of all splits but the training split.
    """
    row: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name, metrics in found.items():
        loss = np.asarray(metrics.loss)
        row[f"{name}/loss"] = np.where(np.isfinite(loss), loss, np.array(None)).tolist()
        row[f"{name}/accuracy"] = result[f"{name}_accuracy"] = metrics.accuracy
        if name != "train":
            result[f"{name}_correct"] = np.asarray(metrics.correct).tolist()
            result[f"{name}_count"] = int(np.max(metrics.count))
    return row, result


def diverged_warning(labels: Sequence[str]) -> str:
    """The warning for members whose loss or gradient became NaN or infinite."""
    names = "; ".join(labels[:3]) + f" and {len(labels) - 3} more" * (len(labels) > 3)
    return f"diverged, and excluded from the statistics while not finite: {names}"


def record(
    config: Config,
    data: DataSpec,
    progress: Progress,
    params: Any,
    warnings: Sequence[str],
    devices: Sequence[jax.Device],
    environment: dict[str, Any],
) -> dict[str, Any]:
    """The content of result.json; `params` are what was evaluated, as NumPy arrays."""
    common = {
        "model": config.model,
        "dataset": data.name,
        "parameters": count_parameters(params) // (config.num_members or 1),
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
    if config.num_members is None:
        return {**common, "params_sha256": params_sha256(params)}
    finite = finite_mask(progress.rows[-1])
    diverged = [label for label, ok in zip(config.member_labels(), finite, strict=True) if not ok]
    members = range(config.num_members)
    common |= {
        "seeds": config.seeds,
        "members": config.members(),
        "params_sha256": [params_sha256(member_of(params, m)) for m in members],
        "diverged": diverged,
        "warnings": [*warnings, diverged_warning(diverged)] if diverged else list(warnings),
    }
    if config.grid:  # other hyperparameters have no common mean
        return common
    statistics = {
        name: summarize(np.array(values)[finite].tolist())
        for name, values in progress.evaluation.items()
        if name.endswith("_accuracy")
    }
    return {**common, "statistics": statistics}


def accuracy_line(record: dict[str, Any]) -> str:
    """The last line of a run: `test accuracy: 92.55 % (9255/10000)`, or the mean of its seeds.

    For a grid, a line for each point.
    """
    lines, members = [], record.get("members", [{}])
    correct, count = np.ravel(record["test_correct"]).tolist(), record["test_count"]
    finite = [member_label(member) not in record.get("diverged", ()) for member in members]
    for label, indices in group_by_point(members).items():
        if record.get("seeds") is None:
            (i,) = indices
            text = f"{percent(correct[i] / count)} ({correct[i]}/{count})"
            text += " diverged" * (not finite[i])
        else:
            text = mean_text(summarize([correct[i] / count for i in indices if finite[i]]))
        lines.append(f"test accuracy: {text}" + f", {label}" * bool(label))
    return "\n".join(lines)


def params_sha256(params: Any) -> str:
    """SHA-256 over every parameter's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
