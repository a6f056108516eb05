"""What the commands on saved runs share: one line for a mistake and for an incomplete run."""

import re
from pathlib import Path

import pytest


@pytest.fixture
def places(runs, copied, pictures, tmp_path) -> dict[str, Path]:
    other, cut, same = copied("many"), copied("one"), copied("grid")
    (empty := tmp_path / "empty").mkdir()
    config = other / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"kmnist"'))
    config = same / "config.json"
    config.write_text(config.read_text().replace('"sha256": null', '"sha256": "0"'))
    (cut / "result.json").unlink()
    found = {"run": runs / "one", "other": other, "cut": cut, "same": same}
    return {**found, "picture": pictures[0], "empty": empty}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("predict {run}", 2, "no picture is named"),
        ("predict {run} {picture} --platform=tpu", 6, "no device for --platform=tpu"),
        ("predict {run} {picture} --device=TPUU", 2, "did you mean tpu?"),
        ("predict {run} {picture} --save_preprocessed={run}/config.json", 6, "cannot write"),
        ("predict {picture} {run}", 2, "is a run; name one run, before the pictures"),
        ("predict nowhere {picture}", 2, "nowhere is neither a run nor a picture"),
        ("ensemble {run} {run}/../one", 2, "a run is named twice"),
        ("evaluate nowhere", 2, "nowhere holds no run"),
        ("evaluate {run} --dataset=mnits", 2, "did you mean mnist"),
        ("evaluate {run} --dataset=", 2, "unknown dataset ''"),
        ("export {run} --member=7", 2, "member is 7; the networks are 0 (seed 5)"),
        ("export {run} --output={run}/no/x", 6, "no/x (No such file or directory); choose another"),
        ("report {run} --output={run}/no/x", 6, "no/x (No such file or directory); choose another"),
        ("report", 2, "no run is named; name one or more run folders"),
        ("ensemble", 2, "no run is named"),
        ("report {run} --output={empty}", 6, "empty (Is a directory)"),
        ("export {run} --output=.", 6, "cannot write . "),
        ("ensemble {run} {other}", 2, "different data sets"),
        ("ensemble {run} {same}", 2, "different data sets (digits of "),
        ("compare {run} {other}", 2, "different data sets"),
    ],
)
def test_a_mistake_gets_one_line(words, status, message, places, command):
    before = sorted(places["run"].rglob("*"))
    found, _, err = command(*(word.format(**places) for word in words.split()))
    assert (found, err.count("\n"), message in err) == (status, 1, True), err
    assert sorted(places["run"].rglob("*")) == before


@pytest.mark.parametrize("name", ["evaluate", "ensemble", "compare", "export", "predict"])
def test_an_incomplete_run_gives_a_warning(name, places, command):
    more = {"compare": [places["run"]], "predict": [places["picture"]]}.get(name, [])
    status, _, err = command(name, places["cut"], *more)
    assert (status, err.count("\n")) == (0, 1)
    assert re.match(f"warning: {places['cut']} .*42 steps", err)
