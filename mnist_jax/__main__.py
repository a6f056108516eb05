"""Everything but training: `python -m mnist_jax COMMAND …`. `--help` lists the commands."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mnist_jax import cli, data, errors
from mnist_jax.config import PLATFORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Checks that a run's folder holds what the run left, and that its accuracy comes out again."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""

    data_dir: Path = data.DEFAULT_DATA_DIR
    """Prepared and decoded data sets are kept here."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, if it is not in data_dir."""

    platform: str | None = None
    """Device that evaluates: cpu, gpu, tpu or auto. None: the run's own."""

    def run(self) -> None:
        """Prints a line for each check; raises for those that failed."""
        from mnist_jax import verify

        if self.platform not in (None, *PLATFORMS):
            raise errors.unknown_choice("platform", self.platform, PLATFORMS)
        wrong = []
        for check in verify.verify(
            self.folder,
            data_dir=self.data_dir,
            manual_dir=self.manual_dir,
            platform=self.platform,
        ):
            print(
                f"{check.name:12s}{'ok   ' if check.good else 'WRONG'}  {check.found}", flush=True
            )
            if not check.good:
                wrong.append(check.name)
        if wrong:
            raise errors.CheckpointError(
                f"{self.folder} is not as its run left it: {', '.join(wrong)}"
            )
        print("OK")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Prepares a data set ahead of time, or checks one that is there."""

    dataset: str = "mnist"
    """mnist, fashion_mnist, kmnist or digits."""

    data_dir: Path = data.DEFAULT_DATA_DIR
    """Prepared and decoded data sets are kept here."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, for a machine without network."""

    def run(self) -> None:
        """Loads it, which proves every image and label, and says where it came from."""
        if self.dataset not in data.DATASETS:
            raise errors.unknown_choice("dataset", self.dataset, data.DATASETS)
        loaded = data.load_dataset(self.dataset, data_dir=self.data_dir, manual_dir=self.manual_dir)
        for notice in loaded.notices:
            print(f"notice: {notice}")
        train, test = len(loaded.train.label), len(loaded.test.label)
        print(f"{loaded.name}: {train:,} train and {test:,} test images, {loaded.source}")


COMMANDS: dict[str, type] = {"data": Data, "verify": Verify}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}s}  {kind.__doc__}" for name, kind in COMMANDS.items()]
    usage = "usage: python -m mnist_jax COMMAND …; each explains itself with --help\n"
    return "\n".join([usage, *lines, "\nTo train: python train.py --help"])


def main(argv: list[str]) -> int:
    """Runs a command; returns its exit status."""

    def command() -> None:
        if not argv or argv[0] in ("--help", "-h"):
            print(_overview())
            return
        name, *words = argv
        if name not in COMMANDS:
            raise errors.unknown_choice("command", name, COMMANDS)
        kind = COMMANDS[name]
        prog = f"python -m mnist_jax {name}"
        cli.parse(kind, words, prog=prog, description=kind.__doc__ or "").run()

    return cli.exit_status(command, debug=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
