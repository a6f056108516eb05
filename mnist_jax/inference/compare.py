"""Ensembles of saved models, and whether one run is better than another."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mnist_jax.data import Dataset
from mnist_jax.errors import UsageError, WorseError
from mnist_jax.inference.evaluate import accuracy_text
from mnist_jax.inference.flags import DataFlags, Runs, print_warnings
from mnist_jax.inference.restore import LoadedRun, Prediction, Predictor, dataset_of, load_runs
from mnist_jax.parallel import mesh
from mnist_jax.runs import statistics
from mnist_jax.runs.statistics import accuracy, percent, summarize

SIGNIFICANT = 0.05  # p below which a difference is significant
REVERSE = "another seed may reverse the result."


def predict_all(
    runs: Sequence[LoadedRun], dataset: Dataset, *, platform: str | None = None, shift: int = 0
) -> Prediction:
    """Predicts the test images with every member of every run, as one ensemble.

    platform: None for each run's own. shift and errors are those of `Predictor`.
    """
    found = []
    for run in runs:
        with mesh.use_device(platform or run.config.platform, run.config.precision) as device:
            found.append(Predictor(run, device, shift=shift)(dataset.test.image))
    return Prediction(
        np.concatenate([prediction.log_probabilities for prediction in found]),
        [seed for prediction in found for seed in prediction.seeds],
        [warning for prediction in found for warning in prediction.warnings],
    )


def vote(prediction: Prediction, label: np.ndarray) -> dict[str, Any]:
    """Accuracy of an ensemble on images with these labels, (images,) int.

    Returns:
        members, their number; single, `summarize` of their accuracies; averaged, the `accuracy` of
        their mean probabilities; majority, that of their votes, a tie going to the more probable
        class; calibration_error of the mean; missed_by_all, indices that no member gets right.
    """
    mean, answers = prediction.mean, prediction.log_probabilities.argmax(2)
    votes = np.eye(mean.shape[1])[answers].sum(0)  # (images, classes)
    right = answers == label
    return {
        "members": len(answers),
        "single": summarize(right.mean(1).tolist()),
        "averaged": accuracy(mean.argmax(1), label),
        "majority": accuracy((votes + mean / 2).argmax(1), label),
        "calibration_error": statistics.calibration_bins(mean, label).error,
        "missed_by_all": np.flatnonzero(~right.any(0)).tolist(),
    }


def compare(a: Prediction, b: Prediction, label: np.ndarray) -> dict[str, Any]:
    """Tests whether the second accuracy differs from the first, on images with these labels.

    Returns:
        images, `mcnemar` and the difference of each side's mean probabilities; seeds, `welch` of
        the members' accuracies, None if a side has one member; better and worse, whether the
        second is so significantly: by seeds if not None, else by images.
    """
    right_a, right_b = (side.mean.argmax(1) == label for side in (a, b))
    difference = float(right_b.mean() - right_a.mean())
    images = {"difference": difference, **statistics.mcnemar(right_a, right_b)}
    members = [(side.log_probabilities.argmax(2) == label).mean(1) for side in (a, b)]
    seeds = statistics.welch(*members) if min(map(len, members)) > 1 else None
    test = seeds or images
    significant = test["p"] < SIGNIFICANT
    better, worse = (significant and sign * test["difference"] > 0 for sign in (1, -1))
    return {"images": images, "seeds": seeds, "better": better, "worse": worse}


def _load(folders: Sequence[Path], flags: DataFlags) -> tuple[list[LoadedRun], Dataset]:
    runs = load_runs(folders)
    dataset = dataset_of(runs[0], **flags.folders_of_data())
    print_warnings(warning for source in (*runs, dataset) for warning in source.warnings)
    print_warnings(mesh.enable_compilation_cache(runs[0].config.compilation_cache))
    return runs, dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(DataFlags):
    """Evaluates all networks of the given runs as one ensemble on the test images."""

    folders: Runs
    """The runs' folders. All networks of a run with --seeds=K take part."""

    shift: int = 0
    """Also classify each image moved by this many pixels in eight directions, and average the nine
    probabilities. 0: do not."""

    json: bool = False
    """Print one JSON object instead."""

    def run(self) -> None:
        """Prints the accuracy of single members and of the ensemble."""
        if not self.folders:
            raise UsageError("no run is given; name one or more run folders")
        if len({folder.absolute() for folder in self.folders}) < len(self.folders):
            raise UsageError("a run is given twice; name each once")
        if not 0 <= self.shift < 28:
            raise UsageError(f"shift is {self.shift}; allowed is 0 to 27; change --shift")
        runs, dataset = _load(self.folders, self)
        prediction = predict_all(runs, dataset, platform=self.platform, shift=self.shift)
        print_warnings(prediction.warnings)
        found = {**vote(prediction, dataset.test.label), "shift": self.shift}
        if self.json:
            print(json.dumps(found))
            return
        single, missed = found["single"], found["missed_by_all"]
        sd = "" if single["sd"] is None else f", sd {percent(single['sd'], '')}"
        print(f"single     {percent(single['mean'])} mean of {single['n']} members{sd}")
        print(f"averaged   {accuracy_text(found['averaged'])}")
        print(f"majority   {accuracy_text(found['majority'])}")
        print(f"calibration error {found['calibration_error']:.4f}")
        more = " …" if len(missed) > 10 else ""
        print(f"images that all members miss: {len(missed)} ", *missed[:10], end=f"{more}\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(DataFlags):
    """Tests whether a second run is better or worse than a first.

    Runs with several seeds each are compared by their seeds (Welch's t-test), others on the test
    images alone (McNemar's test). Exit status 7: the second is significantly worse.
    """

    folders: Annotated[tuple[Path, Path], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN")]
    """The two runs' folders."""

    def run(self) -> None:
        """Prints both tests and the verdict; raises WorseError if the second is worse."""
        runs, dataset = _load(self.folders, self)
        a, b = sides = [predict_all([run], dataset, platform=self.platform) for run in runs]
        print_warnings(warning for side in sides for warning in side.warnings)
        found = compare(a, b, dataset.test.label)
        images, seeds, n = found["images"], found["seeds"], (len(a.seeds), len(b.seeds))
        print(f"seeds in the first run: {n[0]}, in the second: {n[1]}")
        only = f"only the first is right on {images['only_a']}, only the second on"
        print(f"images  {_test(images)} (McNemar); {only} {images['only_b']}")
        if seeds:
            low, high = (f"{100 * end:+.2f}" for end in seeds["ci95"])
            print(f"seeds   {_test(seeds)} (Welch), 95 % interval {low} to {high} points")
        else:
            what = "two single networks" if n == (1, 1) else "with a single network"
            print(f"Comparing {what} says nothing about the recipes:", REVERSE)
        first, second = self.folders
        if found["worse"]:
            raise WorseError(f"{second} is significantly worse than {first}")
        better = f"{second} is significantly better than {first}"
        print(better if found["better"] else "no significant difference")


def _test(found: dict[str, Any]) -> str:
    return f"second {100 * found['difference']:+.2f} points, p = {found['p']:.3g}"
