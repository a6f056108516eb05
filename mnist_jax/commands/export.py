"""The command `export`."""

import dataclasses
import sys
from pathlib import Path

from mnist_jax import errors
from mnist_jax.config import expand_paths
from mnist_jax.runs.statistics import percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a saved model for other programs.

    Either its parameters, or a program that holds them.
    """

    workdir: Path
    """The run's folder."""

    format: str = "safetensors"
    """safetensors: the parameters by their names. stablehlo: a program from pixels to probabilities
    for CPU, NVIDIA GPU and TPU, which jax.export loads without this package, if that JAX is at most
    6 months newer, or 3 weeks older, than the one here."""

    output: Path | None = None
    """The file; its description is put beside it, as <file>.json. Replaces what was exported
    before, and nothing else. None: model.safetensors or model.stablehlo in the run's folder."""

    member: int | None = None
    """Seed of the network to export, from a run with --seeds=K."""

    def __post_init__(self):
        expand_paths(self, "workdir", "output")

    def run(self) -> None:
        """Says what was written, and how good it is."""
        from mnist_jax.inference import export
        from mnist_jax.inference import restore as saved

        if self.format not in export.FORMATS:
            raise errors.unknown_choice("format", self.format, export.FORMATS)
        output = self.output or self.workdir / f"model.{self.format}"
        run = saved.load_run(self.workdir)
        found = export.export(run, self.format, output, self.member)
        for notice in run.notices:
            print(f"notice: {notice}", file=sys.stderr)
        print(f"{output}  {output.stat().st_size / 1e6:.1f} MB, described in {output.name}.json")
        known = "not known" if found["test_accuracy"] is None else percent(found["test_accuracy"])
        which = f"{run.config.model} on {run.config.dataset}, seed {found['seed']}"
        print(f"{which}, test accuracy {known}")
