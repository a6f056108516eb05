"""Flags that the commands on saved runs share."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from mnist_jax.compiler import enable_compilation_cache
from mnist_jax.config import Config
from mnist_jax.errors import UsageError, print_warnings
from mnist_jax.inference.restore import PRETRAINED, LoadedRun, load_run

try:
    from tyro.conf import Positional, arg
except ModuleNotFoundError:  # without tyro there are no commands, but fit and benchmarks run
    Positional, arg = None, dict

RunFolder = Annotated[Path, Positional, arg(metavar="RUN")]
Runs = Annotated[  # may be empty, because tyro has no "one or more"; `open_runs` checks it
    tuple[Path, ...],
    Positional,
    arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformFlags:
    """The flag of a command that computes with a saved model."""

    platform: str | None = None
    """Device to run on: cpu, gpu, tpu, or auto, the best that JAX finds. None: the run's."""

    def __post_init__(self):
        if self.platform is not None:
            object.__setattr__(self, "platform", Config(platform=self.platform).platform)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(PlatformFlags):
    """The flags of a command that evaluates a saved model on its data set."""

    data_dir: Path | None = None
    """Folder where data sets are kept. None: the run's."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without a network."""


def open_runs(folders: Sequence[Path]) -> list[LoadedRun]:
    """Loads a command's runs, prints their warnings and sets the process's compilation cache.

    Raises UsageError if there is none, or if they are of several data sets.
    """
    if PRETRAINED in folders:
        print("no run is named: the MLP that comes with mnist_jax answers", file=sys.stderr)
    runs = [load_run(folder) for folder in folders]
    if not runs:
        raise UsageError("no run is named; name one or more run folders")
    if other := next((run for run in runs if run.data != runs[0].data), None):
        pair = " and ".join(f"{run.data.name} of {run.folder}" for run in (runs[0], other))
        raise UsageError(f"the runs are of different data sets ({pair})")
    print_warnings(warning for run in runs for warning in run.warnings)
    print_warnings(enable_compilation_cache(runs[0].config.compilation_cache))
    return runs
