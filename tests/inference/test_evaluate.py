"""`evaluate`, as a function and as a command."""

import dataclasses
import json
import re

import numpy as np
import pytest
from shared import rows_of

from mnist_jax import Config, Dataset, evaluate, fit, predict
from mnist_jax.errors import DataError, UsageError


def test_accuracy_and_loss_are_those_of_the_run_and_the_confusion_matrix_agrees(runs, split):
    found, row = evaluate(runs / "one"), rows_of(runs / "one")[-1]
    assert (found["dataset"], found["trained_on"], found["count"]) == ("digits", "digits", 360)
    assert found["accuracy"] == row["test/accuracy"]
    assert found["loss"] == pytest.approx(row["test/loss"], rel=1e-5)
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]
    assert (found["warnings"], found["classes"]) == ([], list("0123456789"))
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (split.label, predict(runs / "one", split.image).argmax(1)), 1)
    assert found["confusion"] == expected.tolist()


def test_members_and_ensemble(runs, split):
    found, row = evaluate(runs / "many"), rows_of(runs / "many")[-1]
    members = found["members"]
    assert [member["seed"] for member in members] == [1234, 1235, 1236]
    assert [member["accuracy"] for member in members] == row["test/accuracy"]
    np.testing.assert_allclose([member["loss"] for member in members], row["test/loss"], rtol=1e-5)
    assert found["single"]["mean"] == pytest.approx(np.mean(row["test/accuracy"]))
    mean = predict(runs / "many", split.image)
    correct = np.sum(mean.argmax(1) == split.label), np.trace(found["confusion"])
    assert correct == (found["correct"], found["correct"])
    loss = -np.log(mean[np.arange(360), split.label]).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_loss_is_finite_where_probabilities_underflow(copied, edit_params, split):
    def always_zero(name, array):
        array[...] = 0
        if name.endswith("bias"):
            array[0] = 500

    edit_params(folder := copied("one"), always_zero)
    assert evaluate(folder)["loss"] == pytest.approx(500 * np.mean(split.label != 0))


def test_a_run_on_arrays_is_evaluated_with_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()  # another thing of the same name
    y = np.arange(60) % 3
    x = np.eye(8)[y].reshape(60, 8, 1, 1).repeat(8, axis=2)
    data = Dataset.from_arrays("mine", x, y, x, y)
    given = {"model": "logistic", "epochs": 9, "learning_rate": 0.1, "workdir": tmp_path / "run"}
    record = fit(Config(**given, batch_size=20), dataset=data).record
    assert "\nreport " not in capsys.readouterr().out  # the command could not load them
    assert evaluate(tmp_path / "run", dataset=data)["accuracy"] == record["test_accuracy"]
    with pytest.raises(UsageError, match="trained on mine, arrays that fit was given"):
        evaluate(tmp_path / "run")
    changed = Dataset.from_arrays("mine", 1 - x, y, x, y)
    replaced = dataclasses.replace(data, test=changed.test)
    for other in (changed, replaced):
        with pytest.raises(DataError, match="the data mine have changed since the run"):
            evaluate(tmp_path / "run", dataset=other)
    with pytest.raises(UsageError, match="it differs in the data"):
        fit(Config(**given, batch_size=20), dataset=changed)
    with pytest.raises(UsageError, match="arrays of the data set mine were replaced or held out"):
        fit(Config(**given, batch_size=20), dataset=replaced)


def test_text_output(runs, command):
    status, out, err = command("evaluate", runs / "one")
    lines, found = out.splitlines(), evaluate(runs / "one")
    assert (status, err, lines[0]) == (0, "", "data      digits, 360 test images")
    share = f"{100 * found['accuracy']:.2f}"
    assert lines[1].startswith(f"accuracy  {share} % ({found['correct']}/360), 95 % interval")
    assert lines[2] == f"loss      {found['loss']:.4f}"
    assert re.fullmatch(r"label( +\d){10}  accuracy", lines[-11])
    for label, line in enumerate(lines[-10:]):
        cells = line.replace(".", "0", line.count(" .")).replace("%", "").split()
        counts = found["confusion"][label]
        assert list(map(int, cells[:-1])) == [label, *counts]
        assert float(cells[-1]) == round(100 * counts[label] / sum(counts), 2)
    assert len({len(line) for line in lines[-11:]}) == 1
    assert json.loads(command("evaluate", runs / "one", "--json")[1]) == found
    out = command("evaluate", runs / "many")[1]
    assert len(re.findall(r"^seed 123[456]  [\d.]+ % \(\d+/360\), .*loss [\d.]+$", out, re.M)) == 3
    assert re.search(r"^single +[\d.]+ % mean of 3 members, sd [\d.]+$", out, re.M)
    assert re.search(r"^ensemble +[\d.]+ % ", out, re.M)


def test_another_data_set(copied, data_dir, command):
    config = (folder := copied("one")) / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"fashion_mnist"'))
    status, out, _ = command("evaluate", folder, "--dataset=digits", f"--data_dir={data_dir}")
    assert (status, out.splitlines()[1]) == (0, "trained on  fashion_mnist")
