"""Everything but training: `python -m mnist_jax COMMAND …`. `--help` lists the commands."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mnist_jax import cli, data, errors
from mnist_jax.config import PLATFORMS

if TYPE_CHECKING:
    from mnist_jax.ensemble import Predictions


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evaluating:
    """The flags of the commands that evaluate saved models."""

    data_dir: Path | None = None
    """Prepared and decoded data sets are kept here. None: where the run had them."""

    manual_dir: Path | None = None
    """Folder with the data set's four original .gz files, if it is not in data_dir."""

    platform: str | None = None
    """Device that evaluates: cpu, gpu, tpu, or auto, the best that JAX finds. None: the run's."""

    def __post_init__(self):
        if self.platform not in (None, *PLATFORMS):
            raise errors.unknown_choice("platform", self.platform, PLATFORMS)

    def predict(
        self, folders: Sequence[Path], *, apart: bool = False, shift: int = 0
    ) -> "list[Predictions]":
        """What the members of these runs say of the test images: of all together, or of each apart.

        Prints what there is to notice, such as members that were left out.
        """
        from mnist_jax import ensemble

        runs, dataset = ensemble.load_runs(
            folders, data_dir=self.data_dir, manual_dir=self.manual_dir
        )
        found = [
            ensemble.predict_all(some, dataset, platform=self.platform, shift=shift)
            for some in ([[run] for run in runs] if apart else [runs])
        ]
        for notice in [notice for some in (*runs, *found) for notice in some.notices]:
            print(f"notice: {notice}", file=sys.stderr)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_Evaluating):
    """Checks that a run's folder holds what the run left, and that its accuracy comes out again."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""

    def run(self) -> None:
        """Prints a line for each check; raises for those that failed."""
        from mnist_jax import runs, verify

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(_Evaluating):
    """Lets all members of some runs vote on the test images; none is chosen by its accuracy."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """The runs' folders. A run with --seeds=K counts as K members."""

    shift: int = 0
    """Also show each member every image moved by so many pixels to each of eight sides, and take
    the mean. Reported as such."""

    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> None:
        """Prints the members' own accuracy, and that of their two votes."""
        from mnist_jax import ensemble

        if not self.folders:
            raise errors.UsageError("no run is named; name the folders of one or more")
        if not 0 <= self.shift < 28:
            raise errors.UsageError(f"shift is {self.shift}; allowed is 0 to 27; change --shift")
        found = ensemble.vote(*self.predict(self.folders, shift=self.shift))
        if self.json:
            print(json.dumps({**found, "shift": self.shift}))
            return
        if self.shift:
            print(f"each image seen nine times, moved by {self.shift} pixels")
        single = found["single"]
        sd = "" if single["sd"] is None else f", sd {_percent(single['sd'])}"
        print(f"single     {_percent(single['mean'])} % mean of {found['members']} members{sd}")
        for name in ("averaged", "majority"):
            print(f"{name:11s}{_accuracy(found[name])}")
        print(f"calibration error {found['calibration_error']:.4f}")
        print(f"missed by every member: {_some(found['missed_by_all'])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(_Evaluating):
    """Tells whether a second run is better than a first, or chance; exits with 7 if it is worse."""

    folders: Annotated[tuple[Path, Path], tyro.conf.Positional]
    """The two runs' folders. Of runs with --seeds=K all members count."""

    def run(self) -> None:
        """Prints both tests; raises where the second run is significantly worse."""
        from mnist_jax import ensemble

        found = ensemble.compare(*self.predict(self.folders, apart=True))
        images, seeds = found["images"], found["seeds"]
        print(f"images  second {_points(images['difference'])}: it alone is right on ", end="")
        print(f"{images['only_b']}, the first alone on {images['only_a']}; ", end="")
        print(f"McNemar's p = {images['p']:.3g}")
        if seeds is not None:
            low, high = (_points(end) for end in seeds["ci95"])
            print(
                f"seeds   second {_points(seeds['difference'])}, 95 % from {low} to {high}; ",
                end="",
            )
            print(f"Welch's p = {seeds['p']:.3g}")
        if found["worse"]:
            raise errors.WorseError(f"{self.folders[1]} is significantly worse")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


def _accuracy(found: dict[str, Any]) -> str:
    low, high = (_percent(end) for end in found["ci95"])
    counts = f"({found['correct']}/{found['count']})"
    return f"{_percent(found['accuracy'])} % {counts}, 95 % of such test sets {low} to {high}"


def _some(places: list[int]) -> str:
    shown = " ".join(map(str, places[:50]))
    more = f" and {len(places) - 50} more" if len(places) > 50 else ""
    return f"{len(places)} images{': ' if places else ''}{shown}{more}"


COMMANDS: dict[str, type] = {
    "data": Data,
    "ensemble": Ensemble,
    "compare": Compare,
    "verify": Verify,
}


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
