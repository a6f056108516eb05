"""The command `verify`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from mnist_jax import errors
from mnist_jax.commands.evaluating import Evaluating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Evaluating):
    """Checks a run's files, and that its accuracy comes out again."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""

    def run(self) -> None:
        """Prints a line for each check; raises for those that failed."""
        from mnist_jax.inference import verify
        from mnist_jax.runs import run_dir as runs

        runs.check_idle(self.folder)
        where = {"data_dir": self.data_dir, "manual_dir": self.manual_dir}
        wrong = []
        for check in verify.verify(self.folder, platform=self.platform, **where):
            verdict = "ok" if check.good else "WRONG"
            print(f"{check.name:12s}{verdict:6s}{check.found}", flush=True)
            if not check.good:
                wrong.append(check.name)
        if wrong:
            raise errors.CheckpointError(
                f"{self.folder} is not as its run left it: {', '.join(wrong)}; what the newest "
                "whole checkpoint proves is written again by removing result.json and repeating "
                "the run's command"
            )
        print("OK")
