"""What a run says of itself in numbers: the lines of metrics.jsonl, and result.json."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mnist_jax.config import Config
from mnist_jax.metrics import NEVER, Metrics, finite_mask
from mnist_jax.parallel.ensemble import member_of
from mnist_jax.runs.progress import Progress
from mnist_jax.runs.run_dir import params_sha256
from mnist_jax.runs.statistics import percent, summarize


def metrics(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """Loss and accuracy of an epoch, such as "test/loss", by the names of what was measured."""
    row: dict[str, Any] = {}
    for name, sums in found.items():
        row |= {f"{name}/loss": _or_none(sums.loss), f"{name}/accuracy": sums.accuracy}
    return row


def counts(found: Mapping[str, Metrics]) -> dict[str, Any]:
    """What result.json says of its last epoch: accuracies, and of all but training how many."""
    end: dict[str, Any] = {f"{name}_accuracy": sums.accuracy for name, sums in found.items()}
    for name, sums in found.items():
        if name != "train":
            end[f"{name}_correct"] = np.asarray(sums.correct).tolist()
            end[f"{name}_count"] = int(np.max(sums.count))
    return end


def _or_none(loss: Any) -> Any:
    """Of an ensemble, None for a member whose loss is not finite: JSON has no name for that."""
    if isinstance(loss, list):
        return [value if math.isfinite(value) else None for value in loss]
    return loss


def was_lost(member: int, progress: Progress) -> bool:
    """Whether a member of an ensemble had become non-finite before the call that just ended."""
    if progress.rows and progress.rows[-1]["train/loss"][member] is None:
        return True
    return int(progress.sums.first_nonfinite[member]) != NEVER


def left_out(seed: int) -> str:
    """The notice for a member that became non-finite."""
    return f"the training of seed {seed} is not finite any more; it is left out of the statistics"


def outcome(config: Config, progress: Progress) -> dict[str, Any]:
    """What result.json says of a run's last epoch, and of all its members together."""
    params = jax.device_get(progress.state.params)
    if config.seeds is None:
        return {**progress.end, "params_sha256": params_sha256(params)}
    kept = np.flatnonzero(finite_mask(progress.rows[-1])).tolist()
    statistics = {
        name: summarize([values[member] for member in kept])
        for name, values in progress.end.items()
        if name.endswith("_accuracy")
    }
    members = (member_of(params, member) for member in range(config.seeds))
    seeds = config.all_seeds()
    return {
        "seeds": config.seeds,
        **progress.end,
        "statistics": statistics,
        "nonfinite_seeds": [seed for m, seed in enumerate(seeds) if m not in kept],
        "params_sha256": [params_sha256(member) for member in members],
    }


def accuracy_line(record: dict[str, Any]) -> str:
    """The last line of a run: `test accuracy: 92.55 % (9255/10000)`."""
    correct, count = record["test_correct"], record["test_count"]
    if "statistics" in record:
        of = record["statistics"]["test_accuracy"]
        sd = "" if of["sd"] is None else f", sd {percent(of['sd'], '')}"
        return f"test accuracy: {percent(of['mean'])} mean of {of['n']} seeds{sd}"
    return f"test accuracy: {percent(correct / count)} ({correct}/{count})"
