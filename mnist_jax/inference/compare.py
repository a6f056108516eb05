"""Ensembles of saved models, and whether one run is better than another."""

import dataclasses
from typing import Any, Literal

import numpy as np

from mnist_jax.atomic_io import user_path
from mnist_jax.config import group_by_point
from mnist_jax.data.dataset import hold_out
from mnist_jax.errors import UsageError, WorseError, print_warnings
from mnist_jax.inference.flags import DataFlags, Runs, open_runs
from mnist_jax.inference.restore import Prediction, Predictor, dataset_of
from mnist_jax.runs import statistics

SIGNIFICANT = 0.05  # p below which a difference is significant
ONE_NETWORK = "A run with one network says nothing about the recipe: another seed may reverse it."


def vote(log_probabilities: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """Accuracy of an ensemble, from (members, images, classes) and the labels (images,) int.

    Returns:
        single, `summarize` of the members' accuracies; averaged, the `accuracy` of their mean
        probabilities; majority, that of their votes, a tie going to the more probable class.
    """
    mean, answers = np.exp(log_probabilities).mean(0), log_probabilities.argmax(2)
    votes = np.eye(mean.shape[1])[answers].sum(0)  # (images, classes)
    return {
        "single": statistics.summarize((answers == label).mean(1).tolist()),
        "averaged": statistics.accuracy(mean.argmax(1), label),
        "majority": statistics.accuracy((votes + mean / 2).argmax(1), label),
    }


def compare(a: Prediction, b: Prediction, label: np.ndarray) -> dict[str, Any]:
    """Tests whether the second accuracy differs from the first, on images with these labels.

    Returns:
        images, `mcnemar` and the difference of each side's mean probabilities; seeds, `welch` of
        the members' accuracies, None if a side has one member or is a grid; better and
        worse, whether the second is so significantly: by seeds if not None, else by images.
    """
    right_a, right_b = (side.mean.argmax(1) == label for side in (a, b))
    difference = float(right_b.mean() - right_a.mean())
    images = {"difference": difference, **statistics.mcnemar(right_a, right_b)}
    members = [(side.log_probabilities.argmax(2) == label).mean(1) for side in (a, b)]
    have_seeds = all(len(s.members) > 1 and s.members[0].keys() == {"seed"} for s in (a, b))
    seeds = statistics.welch(*members) if have_seeds else None
    test = seeds or images
    change = test["difference"] if test["p"] < SIGNIFICANT else 0.0
    return {"images": images, "seeds": seeds, "better": change > 0, "worse": change < 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ensemble(DataFlags):
    """Evaluates all networks of the given runs as one ensemble on the test images."""

    folders: Runs
    """The runs' folders. All networks of a run with --seeds=K take part."""

    def run(self) -> None:
        """Prints the accuracy of single members and of the ensemble."""
        if len({user_path(folder).resolve() for folder in self.folders}) < len(self.folders):
            raise UsageError("a run is named twice; name each once")
        runs = open_runs(self.folders)
        dataset = dataset_of(runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir)
        answers = [Predictor(run, self.platform)(dataset.test.image) for run in runs]
        print_warnings([*dataset.warnings, *(text for a in answers for text in a.warnings)])
        members = np.concatenate([answer.log_probabilities for answer in answers])
        found = vote(members, dataset.test.label)
        print(f"single     {statistics.mean_text(found['single'], 'members')}")
        print(f"averaged   {statistics.accuracy_text(found['averaged'])}")
        print(f"majority   {statistics.accuracy_text(found['majority'])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(DataFlags):
    """Tests whether a second run is better or worse than a first.

    Runs with several seeds each are compared by their seeds (Welch's t-test), others on the images
    alone (McNemar's test). Exit status 7: the second is significantly worse.
    """

    folders: Runs
    """The two runs' folders; or that of one run with several values of a hyperparameter, whose
    points are compared with the first."""

    split: Literal["test", "validation"] = "test"
    """The images: test, or validation, those that all runs held out, with which you may choose."""

    def run(self) -> None:
        """Prints the tests and the verdict; raises WorseError if the second run is worse."""
        runs = open_runs(self.folders)
        if len(runs) > 2 or (len(runs) == 1 and not runs[0].config.grid):
            what = "two runs, or one run with several values of a hyperparameter"
            raise UsageError(f"compare takes {what}; {len(runs)} given")
        dataset = dataset_of(runs[0], data_dir=self.data_dir, manual_dir=self.manual_dir)
        image, label = dataset.test
        if self.split == "validation":
            counts = {run.config.validation for run in runs}
            if 0 in counts or len(counts) > 1:
                raise UsageError("the runs did not hold out the same images (--validation)")
            image, label = hold_out(dataset.train, counts.pop())[1]
        sides = [Predictor(run, self.platform)(image) for run in runs]
        print_warnings((*dataset.warnings, *(text for side in sides for text in side.warnings)))
        print(f"on      {len(label):,} {self.split} images")
        if len(sides) == 1:
            _compare_points(sides[0], label)
        else:
            self._compare_runs(sides[0], sides[1], label)

    def _compare_runs(self, a: Prediction, b: Prediction, label: np.ndarray) -> None:
        found = compare(a, b, label)
        images, seeds = found["images"], found["seeds"]
        counts = [len(side.members) for side in (a, b)]
        for side, count in zip(("first", "second"), counts, strict=True):
            many = f"an ensemble: the mean of the probabilities of {count} networks"
            print(f"{side:6s}  {many if count > 1 else 'one network'}")
        only = f"only the first is right on {images['only_a']}, only the second on"
        print(f"images  second {_test(images)} (McNemar); {only} {images['only_b']}")
        if seeds:
            low, high = (f"{100 * end:+.2f}" for end in seeds["ci95"])
            print(f"seeds   second {_test(seeds)} (Welch), 95 % interval {low} to {high} points")
        elif 1 in counts:
            print(ONE_NETWORK)
        first, second = self.folders
        if found["worse"]:
            raise WorseError(f"{second} is significantly worse than {first}")
        better = f"{second} is significantly better than {first}"
        print(better if found["better"] else "no significant difference")


def _compare_points(answers: Prediction, label: np.ndarray) -> None:
    """Tests the networks at each other point of a grid against those at the first."""
    points = []
    for name, own in group_by_point(answers.members).items():
        seeds = [{"seed": answers.members[i]["seed"]} for i in own]
        points.append((name, Prediction(answers.log_probabilities[own], seeds, [])))
    (first, base), *others = points
    if not others:
        raise UsageError(f"only {first} is left, and nothing to compare it with")
    for name, side in others:
        found = compare(base, side, label)
        test, method = found["seeds"] or found["images"], "Welch" if found["seeds"] else "McNemar"
        corrected = {**test, "p": min(1.0, test["p"] * len(others))}  # Bonferroni
        print(f"{name}: {_test(corrected)} ({method}) against {first}")
    print("The p values are corrected for the number of lines (Bonferroni).")
    if len(base.members) == 1:
        print(ONE_NETWORK)


def _test(found: dict[str, Any]) -> str:
    return f"{100 * found['difference']:+.2f} points, p = {found['p']:.3g}"
