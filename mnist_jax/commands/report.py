"""The command `report`."""

import dataclasses
from pathlib import Path

from mnist_jax import errors, storage
from mnist_jax.commands.evaluating import Evaluating, Runs


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
        if not self.folders:
            raise errors.UsageError("no run is named; name the folders of one or more")
        alone = len(self.folders) == 1
        output = self.output or (self.folders[0] if alone else Path()) / "report.html"
        try:
            output = storage.user_path(output)
        except ValueError as error:
            raise errors.UsageError(
                f"output is {str(output)!r}, which is no path ({error}); change --output"
            ) from error
        saved, dataset = self.load(self.folders)
        from mnist_jax import report  # takes half a second: after what may be wrong with the flags

        report.write(output, report.make(saved, dataset, platform=self.platform))
        print(f"report: {output}")
