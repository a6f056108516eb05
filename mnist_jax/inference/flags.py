"""Flags that the commands on saved runs share."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Runs = Annotated[  # may be empty: tyro has no "one or more", so each command checks it
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlatformFlags:
    """The flag of a command that computes with a saved model."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] | None = None
    """Device to run on; auto: the best that JAX finds. None: the run's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(PlatformFlags):
    """The flags of a command that evaluates a saved model on its data set."""

    data_dir: Path | None = None
    """Folder where data sets are kept. None: the run's."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def folders_of_data(self) -> dict[str, Any]:
        """data_dir and manual_dir as keyword arguments."""
        return {"data_dir": self.data_dir, "manual_dir": self.manual_dir}


def print_warnings(messages: Iterable[str]) -> None:
    """Prints each message on stderr as one line, `warning: …`."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
