"""`python -m mnist_jax evaluate`, and the function of that name."""

import json
import re
import shutil

import numpy as np
import pytest

from mnist_jax import Config, __main__, data, evaluate, fit, predict
from mnist_jax.errors import NonFiniteError, UsageError
from mnist_jax.inference import evaluate as evaluation
from mnist_jax.inference import restore as saved


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """A run of one seed and one of three."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seeds in (("one", None), ("many", 3)):
        where = {"dataset": "digits", "data_dir": data_dir, "workdir": folder / name}
        fit(Config(model="logistic", epochs=3, seeds=seeds, **where))
    return folder


@pytest.fixture
def test_split(data_dir):
    return data.load_dataset("digits", data_dir=data_dir).test


def run(capsys, *words) -> tuple[int, str, str]:
    status = __main__.main(["evaluate", *map(str, words)])
    return status, *capsys.readouterr()


def last_row(folder) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_it_finds_what_the_run_found(runs, test_split):
    found, row = evaluate(runs / "one"), last_row(runs / "one")
    assert json.loads(json.dumps(found)) == found
    assert (found["dataset"], found["trained_on"], found["count"]) == ("digits", "digits", 360)
    assert found["accuracy"] == row["test/accuracy"]
    assert found["loss"] == pytest.approx(row["test/loss"], rel=1e-5)
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]
    assert found["notices"] == []


def test_the_confusions_are_counts_of_label_and_answer(runs, test_split):
    found = evaluate(runs / "one")
    answers = predict(runs / "one", test_split.image).argmax(1)
    for label in range(10):
        for answer in range(10):
            count = np.sum((test_split.label == label) & (answers == answer))
            assert found["confusion"][label][answer] == count
    assert [kind["name"] for kind in found["classes"]] == list("0123456789")
    for label, kind in enumerate(found["classes"]):
        assert kind["correct"] == found["confusion"][label][label]
        assert kind["count"] == np.sum(test_split.label == label)
        assert kind["accuracy"] == kind["correct"] / kind["count"]


def test_of_an_ensemble_each_member_and_the_vote_are_judged(runs, test_split):
    found, row = evaluate(runs / "many"), last_row(runs / "many")
    members = found["members"]
    assert [member["seed"] for member in members] == [1234, 1235, 1236]
    assert [member["accuracy"] for member in members] == row["test/accuracy"]
    np.testing.assert_allclose([member["loss"] for member in members], row["test/loss"], rtol=1e-5)
    assert (found["single"]["n"], found["single"]["mean"]) == (
        3,
        pytest.approx(np.mean(row["test/accuracy"])),
    )
    together = predict(runs / "many", test_split.image)
    assert found["correct"] == np.sum(together.argmax(1) == test_split.label)
    assert np.trace(found["confusion"]) == found["correct"]
    of_label = together[np.arange(360), test_split.label]
    assert found["loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-5)


def test_the_loss_of_a_model_that_is_sure_and_wrong_is_finite(runs, monkeypatch, test_split):
    """Probabilities of 1e-45 and less are 0 in float32, and their logarithm infinite."""
    logits = np.zeros((1, 360, 10), np.float32)
    logits[0, np.arange(360), (test_split.label + 1) % 10] = 500
    monkeypatch.setattr(saved.Classifier, "__call__", lambda self, images: logits)
    assert evaluate(runs / "one")["loss"] == pytest.approx(500)


def test_a_member_that_is_not_finite_is_left_out(runs, monkeypatch):
    class Spoilt(saved.Classifier):
        lost = [1]  # noqa: RUF012

        def __call__(self, images):
            found = super().__call__(images)
            found[self.lost, 7] = np.inf
            return found

    monkeypatch.setattr(evaluation, "Classifier", Spoilt)
    found = evaluate(runs / "many")
    assert [member["seed"] for member in found["members"]] == [1234, 1236]
    assert found["notices"] == [f"seed 1235 of {runs / 'many'} is not finite; it is left out"]
    Spoilt.lost = [0, 1, 2]
    with pytest.raises(NonFiniteError, match="no member is left"):
        evaluate(runs / "many")


def test_a_person_sees_a_table(runs, capsys):
    status, out, err = run(capsys, f"--workdir={runs / 'one'}")
    lines, found = out.splitlines(), evaluate(runs / "one")
    assert (status, err) == (0, "")
    assert lines[0] == "data      digits, 360 test images"
    share = f"{100 * found['accuracy']:.2f}"
    assert lines[1].startswith(f"accuracy  {share} % ({found['correct']}/360), 95 % interval")
    assert lines[2] == f"loss      {found['loss']:.4f}"
    assert re.fullmatch(r"label( +\d){10}  accuracy", lines[-11])
    for label, line in enumerate(lines[-10:]):
        cells = line.replace("%", "").split()
        counts = [0 if cell == "." else int(cell) for cell in cells[1:-1]]
        assert (int(cells[0]), counts) == (label, found["confusion"][label])
        assert float(cells[-1]) == pytest.approx(
            100 * found["classes"][label]["accuracy"], abs=0.01
        )
    assert len({len(line) for line in lines[-11:]}) == 1

    out = run(capsys, f"--workdir={runs / 'many'}")[1]
    assert len(re.findall(r"^seed 123[456]  [\d.]+ % \(\d+/360\), loss [\d.]+$", out, re.M)) == 3
    assert re.search(r"^single    [\d.]+ % mean of 3 members, sd [\d.]+$", out, re.M)
    assert re.search(r"^together  [\d.]+ % ", out, re.M)


def test_json_is_one_object(runs, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    status, out, _ = run(capsys, "--workdir=~/one", "--json")
    assert (status, out.count("\n")) == (0, 1)
    assert json.loads(out) == evaluate(runs / "one")


def test_another_data_set_is_named(runs, data_dir, tmp_path, capsys):
    """The digits, seen by a model that was trained on fashion's classes."""
    shutil.copytree(runs / "one", tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"fashion_mnist"'))
    where = f"--data_dir={data_dir}"
    status, out, _ = run(capsys, f"--workdir={tmp_path / 'run'}", "--dataset=digits", where)
    assert status == 0
    assert out.startswith(
        "data      digits, 360 test images; the model was trained on fashion_mnist"
    )
    assert evaluate(tmp_path / "run", dataset="digits", data_dir=str(data_dir))["correct"]


def test_a_data_set_with_other_classes_is_refused(runs, monkeypatch):
    monkeypatch.setattr("mnist_jax.data.class_names", lambda name: ("a", "b"))
    with pytest.raises(UsageError, match="digits has 2 classes, the model 10; choose another"):
        evaluate(runs / "one")


def test_a_class_without_images_has_no_accuracy(runs, monkeypatch, capsys, test_split):
    few = test_split.image[test_split.label < 9], test_split.label[test_split.label < 9]
    dataset = data.load_dataset("digits")
    object.__setattr__(dataset, "test", data.Split(*few))
    monkeypatch.setattr("mnist_jax.inference.restore.load_dataset", lambda *_, **__: dataset)
    assert evaluate(runs / "one")["classes"][9]["accuracy"] is None
    assert run(capsys, f"--workdir={runs / 'one'}")[1].splitlines()[-1].endswith(" -")


def test_a_run_that_is_not_complete_is_noticed(runs, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    status, _, err = run(capsys, f"--workdir={tmp_path / 'cut'}")
    assert status == 0
    assert err == f"notice: {tmp_path / 'cut'} is not complete: it stands at step 45\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "^error: --workdir is missing"),
        (["--workdir=nowhere"], 2, "nowhere holds no run"),
        (["--workdir=BROKEN"], 4, "holds no checkpoint"),
        (["--workdir=RUN", "--dataset=mnits"], 2, "did you mean mnist"),
        (["--workdir=RUN", "--dataset=auto"], 2, "unknown dataset 'auto'; choose from digits"),
        (["--workdir=RUN", "--dataset=mnist", "--manual_dir=nowhere"], 3, "is not a folder"),
        (["--workdir=RUN", "--manual_dir=a\0b"], 2, "which is no path"),
        (["--workdir=RUN", "--platform=gup"], 2, "did you mean gpu"),
        (["--workdir=RUN", "more"], 2, "'more' belongs to no flag"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, status, message, runs, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints")
    places = {"RUN": str(runs / "one"), "BROKEN": str(tmp_path / "broken")}
    words = [re.sub("RUN|BROKEN", lambda match: places[match[0]], word) for word in words]
    found, _, err = run(capsys, *words)
    assert (found, err.count("\n")) == (status, 1)
    assert re.search(message, err), err
