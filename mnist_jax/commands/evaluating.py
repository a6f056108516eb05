"""What the commands that evaluate saved models share."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mnist_jax import errors
from mnist_jax.config import PLATFORMS, Config, expand_paths
from mnist_jax.runs.statistics import percent

if TYPE_CHECKING:
    from mnist_jax.data import Dataset
    from mnist_jax.inference.compare import Predictions
    from mnist_jax.inference.restore import LoadedRun


REQUIRED = "(required)"  # one or more, which each command checks to say what is missing
Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint=REQUIRED),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing:
    """The flag of the commands that compute with saved models."""

    platform: str | None = None
    """Device to run on: cpu, gpu, tpu, or auto, the best that JAX finds. None: the run's."""

    def __post_init__(self):
        if self.platform not in (None, *PLATFORMS):
            raise errors.unknown_choice("platform", self.platform, PLATFORMS)

    def keep_compiled(self, config: Config) -> None:
        """Keeps programs where the run kept its own; without them all works, but slower."""
        from mnist_jax.parallel import mesh as devices

        devices.keep_compiled(config.compilation_cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluating(Computing):
    """The flags of the commands that evaluate saved models."""

    data_dir: Path | None = None
    """Folder where prepared and decoded data sets are kept. None: the run's."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def __post_init__(self):
        super().__post_init__()
        expand_paths(self, "data_dir", "manual_dir")

    def predict(
        self, folders: Sequence[Path], *, apart: bool = False, shift: int = 0
    ) -> "list[Predictions]":
        """What the members of these runs say of the test images: of all together, or of each apart.

        Prints what there is to notice, such as members that were left out.
        """
        from mnist_jax.inference import compare as ensemble

        runs, dataset = self.load(folders)
        found = [
            ensemble.predict_all(some, dataset, platform=self.platform, shift=shift)
            for some in ([[run] for run in runs] if apart else [runs])
        ]
        for notice in [notice for some in (*runs, *found) for notice in some.notices]:
            print(f"notice: {notice}", file=sys.stderr)
        return found

    def load(self, folders: Sequence[Path]) -> "tuple[list[LoadedRun], Dataset]":
        """The runs and their data set, and a place for compiled programs."""
        from mnist_jax.inference import restore as saved

        runs = saved.load_runs(folders)
        dataset = saved.dataset_of(runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir)
        self.keep_compiled(runs[0].config)
        return runs, dataset


def accuracy(found: dict[str, Any]) -> str:
    """What `statistics.accuracy` found, in words."""
    low, high = (percent(end, "") for end in found["ci95"])
    counts = f"({found['correct']}/{found['count']})"
    return f"{percent(found['accuracy'])} {counts}, 95 % interval {low} to {high}"
