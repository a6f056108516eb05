"""The command `report`."""

import dataclasses
from pathlib import Path

from mnist_jax import errors
from mnist_jax.commands.evaluating import Evaluating, Runs
from mnist_jax.config import checked_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Evaluating):
    """Makes a page with the curves, errors, weights and times of runs."""

    folders: Runs
    """The runs' folders, complete or not."""

    output: Path | None = None
    """The page's file. None: report.html, for one run in its folder, for several in the current
    one."""

    def run(self) -> None:
        """Writes the page and prints where it is."""
        from mnist_jax.inference import restore as saved
        from mnist_jax.runs import run_dir as runs

        if not self.folders:
            raise errors.UsageError("no run is named; name the folders of one or more")
        alone = len(self.folders) == 1
        output = self.output or (self.folders[0] if alone else Path()) / runs.REPORT
        output = checked_path("output", output)
        if alone:
            found, dataset = self.load(self.folders)
        else:  # whose numbers are in their folders
            found, dataset = saved.load_runs(self.folders), None
        from mnist_jax.reporting import (
            report,  # takes half a second: after what may be wrong with the flags
        )

        report.write(output, report.make(found, dataset, platform=self.platform))
        print(f"report: {output}")
