"""A run's results as JSON: the lines of metrics.jsonl, and result.json."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mnist_jax.config import Config
from mnist_jax.metrics import NEVER, Metrics, finite_mask
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.checkpoint import Progress, names_of
from mnist_jax.runs.statistics import percent, summarize


def metrics_row(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """Loss and accuracy of each split, such as "test/loss"; None for a loss that is not finite."""
    row: dict[str, Any] = {}
    for name, metrics in found.items():
        row[f"{name}/loss"] = _finite_or_none(metrics.loss)
        row[f"{name}/accuracy"] = metrics.accuracy
    return row


def _finite_or_none(loss: Any) -> Any:
    if isinstance(loss, list):
        return [_finite_or_none(value) for value in loss]
    return loss if math.isfinite(loss) else None


def evaluation(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """The accuracy of each split, and the counts of all but the training split."""
    values: dict[str, Any] = {f"{name}_accuracy": found[name].accuracy for name in found}
    for name, metrics in found.items():
        if name != "train":
            values[f"{name}_correct"] = np.asarray(metrics.correct).tolist()
            values[f"{name}_count"] = int(np.max(metrics.count))
    return values


def newly_diverged(metrics: Metrics, progress: Progress) -> list[int]:
    """Members whose loss or gradient was finite until the call that gave `metrics`."""
    diverged = np.ravel(metrics.first_nonfinite) != NEVER
    before = np.ravel(progress.metrics.first_nonfinite) != NEVER
    if progress.rows:
        before |= ~np.array(finite_mask(progress.rows[-1]))
    return np.flatnonzero(diverged & ~before).tolist()


def diverged_warning(seed: int) -> str:
    """The warning for a member whose loss or gradient became NaN or infinite."""
    return f"seed {seed} diverged: its loss is not finite; the statistics exclude it"


def outcome(config: Config, progress: Progress) -> dict[str, Any]:
    """What result.json says of the last epoch, and of all members together.

    Args:
        config: resolved.
        progress: at the end, with NumPy arrays.
    """
    params = progress.state.params
    if config.seeds is None:
        return {**progress.evaluation, "params_sha256": params_sha256(params)}
    finite = np.flatnonzero(finite_mask(progress.rows[-1])).tolist()
    statistics = {
        name: summarize([values[member] for member in finite])
        for name, values in progress.evaluation.items()
        if name.endswith("_accuracy")
    }
    seeds = config.all_seeds()
    return {
        "seeds": config.seeds,
        **progress.evaluation,
        "statistics": statistics,
        "diverged_seeds": [seed for member, seed in enumerate(seeds) if member not in finite],
        "params_sha256": [params_sha256(member_of(params, m)) for m in range(config.seeds)],
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
        array = np.asarray(leaf, order="C")
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(little_endian.tobytes())
    return digest.hexdigest()
