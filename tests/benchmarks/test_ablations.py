"""The table of ablations, on a small scale."""

import json
import shlex

import pytest

from benchmarks import ablations
from mnist_jax import Config, cli


def test_a_row_for_each_change_with_every_seed(data_dir, tmp_path, monkeypatch, capsys):
    changes = {"logistic": [{}, {"learning_rate": 1e-5}], "mlp": [{}, {"activation": "sigmoid"}]}
    monkeypatch.setattr(ablations, "ABLATIONS", changes)
    file = tmp_path / "ablations.json"
    where = {"dataset": "digits", "data_dir": data_dir, "output": file}
    ablations.measure(ablations.Options(seeds=2, epochs=1, **where))
    content = json.loads(file.read_text())
    assert [(row["model"], row["change"]) for row in content["tables"]["ablations"]] == [
        (model, change) for model, rows in changes.items() for change in rows
    ]
    assert all(len(row["test_accuracy"]) == 2 for row in content["tables"]["ablations"])
    best, worst = (content["tables"]["ablations"][i]["statistics"]["mean"] for i in (0, 1))
    assert best > worst
    assert "--activation=sigmoid" in capsys.readouterr().out


@pytest.mark.parametrize("model", ablations.ABLATIONS)
def test_each_row_s_command_is_its_change(model):
    for change in ablations.ABLATIONS[model]:
        _, _, *words = shlex.split(ablations.flags(model, change, "mnist", 10, 10))
        config = cli.parse_config(words, prog="", description="")
        assert config == Config(model=model, dataset="mnist", seeds=10, **change)
