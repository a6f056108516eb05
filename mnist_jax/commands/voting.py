"""The commands `ensemble` and `compare`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from mnist_jax import errors
from mnist_jax.commands.evaluating import Evaluating, Runs, accuracy
from mnist_jax.runs.statistics import percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(Evaluating):
    """Lets the networks of runs vote on the test images.

    All of them vote: none is chosen by its accuracy.
    """

    folders: Runs
    """The runs' folders. Of a run with --seeds=K all networks vote."""

    shift: int = 0
    """Also show each network every image moved by this many pixels in each of eight directions, and
    take the mean of its nine answers. 0: do not."""

    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> None:
        """Prints the members' own accuracy, and that of their two votes."""
        from mnist_jax.inference import compare as ensemble

        if not self.folders:
            raise errors.UsageError("no run is named; name the folders of one or more")
        if len({folder.absolute() for folder in self.folders}) < len(self.folders):
            raise errors.UsageError("a run is named twice; each has one vote")
        if not 0 <= self.shift < 28:
            raise errors.UsageError(f"shift is {self.shift}; allowed is 0 to 27; change --shift")
        found = ensemble.vote(*self.predict(self.folders, shift=self.shift))
        if self.json:
            print(json.dumps({**found, "shift": self.shift}))
            return
        if self.shift:
            print(f"each image seen nine times, moved by {self.shift} pixels")
        single = found["single"]
        sd = "" if single["sd"] is None else f", sd {percent(single['sd'], '')}"
        members = f"{found['members']} member{'s' * (found['members'] > 1)}"
        print(f"single     {percent(single['mean'])} mean of {members}{sd}")
        for name in ("averaged", "majority"):
            print(f"{name:11s}{accuracy(found[name])}")
        print(f"calibration error {found['calibration_error']:.4f}")
        print(f"missed by every member: {_some(found['missed_by_all'])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(Evaluating):
    """Tells whether a second run is better than a first, or chance.

    Two networks are compared on the images; another seed might turn that round. Whether a recipe is
    better, two runs with several seeds each can tell. Exits with 7 where the second is
    significantly worse.
    """

    folders: Annotated[tuple[Path, Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN")]
    """The two runs' folders. Of a run with --seeds=K all networks count."""

    def run(self) -> None:
        """Prints both tests and what they say; raises where the second is significantly worse."""
        from mnist_jax.inference import compare as ensemble

        found = ensemble.compare(*self.predict(self.folders, apart=True))
        images, seeds = found["images"], found["seeds"]
        first, second = found["members"]
        if (first, second) != (1, 1):
            print(f"votes   of {first} against {second} networks, on the images:")
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
        here = "" if seeds is not None else " on these images; another seed's may be otherwise"
        if found["worse"]:
            raise errors.WorseError(f"{self.folders[1]} is significantly worse{here}")
        better = f"{self.folders[1]} is significantly better{here}"
        print(better if found["better"] else "the difference may be chance")


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


def _some(places: list[int]) -> str:
    shown = " ".join(map(str, places[:50]))
    more = f" and {len(places) - 50} more" if len(places) > 50 else ""
    return f"{len(places)} images{': ' if places else ''}{shown}{more}"
