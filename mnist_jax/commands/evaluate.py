"""The command `evaluate`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from mnist_jax import data, errors
from mnist_jax.commands.evaluating import Evaluating, accuracy
from mnist_jax.config import expand_paths
from mnist_jax.runs.statistics import percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Evaluating):
    """Shows how good a saved model is on the test images, and what it confuses."""

    workdir: Path
    """The run's folder. Of a run with --seeds=K: each network, and the mean of their answers."""

    dataset: str | None = None
    """The images: the test part of mnist, fashion_mnist, kmnist or digits. None: the run's."""

    json: bool = False
    """Print one JSON object instead."""

    def __post_init__(self):
        super().__post_init__()
        expand_paths(self, "workdir")

    def run(self) -> None:
        """Prints the accuracy, the loss and the table of confusions."""
        from mnist_jax.inference import evaluate as evaluation
        from mnist_jax.inference import restore as saved

        if self.dataset not in (None, *data.DATASETS):
            raise errors.unknown_choice("dataset", self.dataset, data.DATASETS)
        self.keep_compiled(saved.load_config(self.workdir))
        found = evaluation.evaluate(
            self.workdir,
            dataset=self.dataset,
            data_dir=self.data_dir,
            manual_dir=self.manual_dir,
            platform=self.platform,
        )
        for notice in found["notices"]:
            print(f"notice: {notice}", file=sys.stderr)
        print(json.dumps(found) if self.json else "\n".join(_lines(found)), flush=True)


def _lines(found: dict[str, Any]) -> list[str]:
    """What was found, for a person."""
    other = found["dataset"] != found["trained_on"]
    trained = f"; the model was trained on {found['trained_on']}" if other else ""
    lines = [f"data      {found['dataset']}, {found['count']:,} test images{trained}"]
    if len(found["members"]) > 1:
        lines += [
            f"seed {member['seed']}  {percent(member['accuracy'])} "
            f"({member['correct']}/{member['count']}), loss {member['loss']:.4f}"
            for member in found["members"]
        ]
        single = found["single"]
        lines.append(
            f"single    {percent(single['mean'])} mean of {single['n']} members, "
            f"sd {percent(single['sd'], '')}"
        )
    name = "together" if len(found["members"]) > 1 else "accuracy"
    lines += [f"{name}  {accuracy(found)}", f"loss      {found['loss']:.4f}", ""]
    lines.append("what the images of each class are taken for:")
    return [*lines, *_table(found)]


def _table(found: dict[str, Any]) -> list[str]:
    """The confusions: a row for each label, a column for each answer, and the share on its own."""
    rows = [["label", *map(str, range(len(found["classes"]))), "accuracy"]]
    for label, (kind, counts) in enumerate(zip(found["classes"], found["confusion"], strict=True)):
        name = kind["name"] if kind["name"] == str(label) else f"{label} {kind['name']}"
        rows.append([name, *(str(count or ".") for count in counts), percent(kind["accuracy"])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
