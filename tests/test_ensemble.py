"""Votes and comparisons of saved runs."""

import json
import shutil

import numpy as np
import pytest

from mnist_jax import Config, __main__, fit
from mnist_jax.inference import compare as ensemble
from mnist_jax.inference import restore as saved
from mnist_jax.inference.compare import Predictions


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data_dir):
    """A run of three seeds, one of one seed, and a worse one of three."""
    folder = tmp_path_factory.mktemp("runs")
    base = {"dataset": "digits", "data_dir": data_dir, "epochs": 3}
    configs = {
        "many": {"model": "mlp", "seeds": 3},
        "one": {"model": "logistic", "seed": 5},
        "worse": {"model": "mlp", "seeds": 3, "learning_rate": 1e-5},
    }
    for name, fields in configs.items():
        fit(Config(workdir=folder / name, **base, **fields))
    return folder


def run(capsys, data_dir, *words) -> tuple[int, str, str]:
    status = __main__.main([*map(str, words), f"--data_dir={data_dir}"])
    return status, *capsys.readouterr()


def test_predictions_are_those_of_the_run_s_own_evaluation(folders, data_dir):
    runs = saved.load_runs([folders / "many"])
    dataset = saved.dataset_of(runs[0], data_dir=data_dir)
    found = ensemble.predict_all(runs, dataset, platform="cpu")
    record = json.loads((folders / "many" / "result.json").read_text())
    assert found.right.sum(1).tolist() == record["test_correct"]
    np.testing.assert_allclose(found.probabilities.sum(2), 1, rtol=1e-5)


def test_shifted_images_are_moved_to_all_eight_sides(folders, data_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(saved.steps, "to_input", lambda image, normalize: image.astype("float32"))
    one = saved.load_run(folders / "one")
    monkeypatch.setattr(
        type(one.model), "apply", lambda self, params, x, train: seen.append(x) or x[:, 0, :10, 0]
    )
    image = np.zeros((1, 28, 28, 1), np.uint8)
    image[0, 10, 12] = 9
    import jax

    with jax.disable_jit():
        saved.Classifier(one, jax.devices()[0], shift=2)(image)
    places = {tuple(np.argwhere(x[0, :, :, 0] == 9)[0].tolist()) for x in map(np.asarray, seen)}
    assert places == {(10 + y, 12 + x) for y in (-2, 0, 2) for x in (-2, 0, 2)}


def test_votes_by_hand():
    """Three members, four images, three classes."""
    rows = [
        # all agree; two against one; the average outvotes the majority; a tie of three
        [[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2]],
        [[0.8, 0.1, 0.1], [0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.1, 0.8, 0.1]],
        [[0.8, 0.1, 0.1], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.6]],
    ]
    label = np.array([0, 0, 0, 1])
    found = ensemble.vote(Predictions(np.array(rows, np.float32), label, []))
    assert found["averaged"]["correct"] == 3  # but for the second
    assert found["majority"]["correct"] == 3  # but for the third
    assert found["missed_by_all"] == []
    assert found["single"]["mean"] == pytest.approx((2 + 3 + 2) / 12)
    assert found["members"] == 3


def test_the_ensemble_counts_every_member(folders, data_dir, capsys):
    status, out, _ = run(capsys, data_dir, "ensemble", folders / "many", folders / "one", "--json")
    found = json.loads(out)
    assert (status, found["members"], found["averaged"]["count"]) == (0, 4, 360)
    status, out, _ = run(capsys, data_dir, "ensemble", folders / "many", "--shift=1")
    assert status == 0
    assert out.startswith("each image seen nine times, moved by 1 pixels\nsingle ")


def test_a_worse_run_exits_with_7_and_a_better_one_with_0(folders, data_dir, capsys):
    status, out, err = run(capsys, data_dir, "compare", folders / "many", folders / "worse")
    assert (status, err) == (7, f"error: {folders / 'worse'} is significantly worse\n")
    assert out.startswith("votes   of 3 against 3 networks, on the images:\nimages  second -")
    assert "\nseeds   second -" in out
    status, out, _ = run(capsys, data_dir, "compare", folders / "worse", folders / "many")
    assert (status, out.splitlines()[-1]) == (0, f"{folders / 'many'} is significantly better")
    status, out, _ = run(capsys, data_dir, "compare", folders / "one", folders / "one")
    assert (status, out.count("\n")) == (0, 2)
    assert "p = 1\nthe difference may be chance" in out
    status, out, err = run(capsys, data_dir, "compare", folders / "one", folders / "worse")
    assert (status, out[:31]) == (7, "votes   of 1 against 3 networks")
    assert err.endswith("is significantly worse on these images; another seed's may be otherwise\n")


def test_a_member_that_is_not_finite_is_left_out_with_a_notice(folders, data_dir, monkeypatch):
    class Spoilt(saved.Classifier):
        def __call__(self, images):
            found = super().__call__(images)
            found[1] = np.nan
            return found

    monkeypatch.setattr(ensemble, "Classifier", Spoilt)
    runs = saved.load_runs([folders / "many"])
    dataset = saved.dataset_of(runs[0], data_dir=data_dir)
    found = ensemble.predict_all(runs, dataset, platform="cpu")
    assert len(found.probabilities) == 2
    assert found.notices == [f"seed 1235 of {folders / 'many'} is not finite; it is left out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ensemble"], "no run is named"),
        (["ensemble", "nowhere"], "nowhere holds no run"),
        (["ensemble", "x", "y", "./x"], "a run is named twice"),
        (["ensemble", "x", "--shift=28"], "shift is 28; allowed is 0 to 27"),
        (["compare", "x"], "folders"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, message, data_dir, capsys):
    status, _, err = run(capsys, data_dir, *words)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_runs_of_different_data_sets_are_refused(folders, data_dir, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in (folders / "one").rglob("*"):
        if path.is_file():
            target = other / path.relative_to(folders / "one")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes().replace(b'"digits"', b'"kmnist"'))
    for command in ("ensemble", "compare"):
        status, _, err = run(capsys, data_dir, command, folders / "one", other)
        assert (status, "of different data sets (digits, kmnist)" in err) == (2, True)


def test_a_run_that_is_not_complete_is_noticed(folders, data_dir, tmp_path, capsys):
    shutil.copytree(folders / "one", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    status, _, err = run(capsys, data_dir, "compare", tmp_path / "cut", folders / "one")
    assert (status, err) == (
        0,
        f"notice: {tmp_path / 'cut'} is not complete: it stands at step 45\n",
    )


def test_the_data_is_looked_for_where_the_run_had_it(folders, capsys):
    assert __main__.main(["compare", str(folders / "one"), str(folders / "one")]) == 0
    assert capsys.readouterr().err == ""
