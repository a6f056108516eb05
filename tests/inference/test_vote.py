"""`ensemble` and `compare`, and the functions behind them."""

import json
import re

import numpy as np
import pytest

from mnist_jax import predict
from mnist_jax.inference import compare
from mnist_jax.inference.restore import Prediction, Predictor, load_run
from mnist_jax.runs.statistics import mcnemar

RECIPES = "A run with one network says nothing about the recipe: another seed may reverse it."


def prediction(*members) -> Prediction:
    seeds = [{"seed": seed} for seed in range(len(members))]
    return Prediction(np.log(np.maximum(members, 1e-9)), seeds, [])


def test_votes_by_hand():
    rows = [
        # all agree; two against one; the average outvotes the majority; a tie of three
        [[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2]],
        [[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.1, 0.8, 0.1]],
        [[0.8, 0.1, 0.1], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]],
    ]
    found = compare.vote(prediction(*rows).log_probabilities, np.array([0, 0, 0, 1]))
    assert found["averaged"]["correct"] == found["majority"]["correct"] == 3  # of different ones
    assert found["single"]["mean"] == pytest.approx((2 + 3 + 2) / 12)


def test_seeds_decide_where_each_side_has_several():
    """The accuracies overlap although the means differ on 12 images; without seeds that decides."""
    label = np.zeros(100, int)

    def side(*correct) -> Prediction:
        place = np.arange(100)[:, None]
        return prediction(*(np.where(place < n, [0.6, 0.4], [0.1, 0.9]) for n in correct))

    found = compare.compare(side(90, 50), side(91, 62), label)
    assert found["seeds"]["difference"] == pytest.approx(0.065)
    assert found["images"]["difference"] == pytest.approx(0.12)
    assert (found["better"], found["worse"]) == (False, False)
    found = compare.compare(side(50), side(62), label)
    assert (found["seeds"], found["better"], found["worse"]) == (None, True, False)
    assert not compare.compare(side(50), side(54), label)["better"]  # p is 1/8
    grid = side(50, 90)._replace(members=[{"learning_rate": x, "seed": 0} for x in (0.1, 0.2)])
    assert compare.compare(grid, grid, label)["seeds"] is None  # other recipes, not other seeds


def test_ensemble_command(runs, split, command):
    many, one = (predict(runs / name, split.image) for name in ("many", "one"))
    correct = np.sum((3 * many + one).argmax(1) == split.label)
    status, out, err = command("ensemble", runs / "many", runs / "one")
    single, averaged, majority = out.splitlines()
    assert (status, err, "mean of 4 members, sd " in single) == (0, "", True)
    assert f"({correct}/360)" in averaged
    for line in (averaged, majority):
        assert re.search(r" [\d.]+ % \(\d+/360\), 95 % interval", line)


def test_compare_command(runs, copied, split, command):
    many, worse, one = (str(runs / name) for name in ("many", "worse", "one"))
    status, out, err = command("compare", many, worse)
    assert (status, err) == (7, f"{worse} is significantly worse than {many}\n")
    assert RECIPES not in out
    status, out, _ = command("compare", worse, many)
    assert (status, out.splitlines()[-1]) == (0, f"{many} is significantly better than {worse}")
    status, out, _ = command("compare", one, one)
    assert (status, out.splitlines()[-2:]) == (0, [RECIPES, "no significant difference"])
    grid = copied("many")
    values = json.loads((grid / "config.json").read_text())
    values |= {"seeds": None, "learning_rate": [0.1, 0.2, 0.3]}
    (grid / "config.json").write_text(json.dumps(values))
    status, out, _ = command("compare", grid)
    lines = out.splitlines()
    right = Predictor(load_run(grid))(split.image).log_probabilities.argmax(2) == split.label
    p = min(1.0, 2 * mcnemar(right[0], right[1])["p"])  # two points against the first
    assert f"p = {p:.3g} (McNemar) against learning_rate 0.1" in lines[1]
    assert (status, lines[0], lines[-1]) == (0, "on      360 test images", RECIPES)
    assert "on      100 valid" in command("compare", one, one, "--split=validation")[1]
    assert "not hold out the same images" in command("compare", one, worse, "--split=validation")[2]
    status, _, err = command("compare", one)
    assert (status, "two runs, or one run with several values" in err) == (2, True)
    status, out, err = command("compare", one, grid)
    assert (status, RECIPES in out) == (7, True)
    ensemble = "an ensemble: the mean of the probabilities of 3 networks"
    assert out.splitlines()[1:3] == ["first   one network", f"second  {ensemble}"]
