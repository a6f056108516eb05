"""The result file: what is written is read again, and what is no such file is refused."""

from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Benchmark, Recorder, Results
from mnist_jax.errors import DataError, DeviceError

TIMES = {"samples_s": [1.5e-3, 2e-3], "warmup_s": [3.0], "details": {"launch": 0}}
ONE = Benchmark(name="train_step", model="mlp", batch_size=100, mode="many", **TIMES)
OTHERS = [None, "[]", '{"version": 1, "benchm']
OTHERS += ['{"version": 1, "context": {}, "benchmarks": [{"name": "x"}], "tables": {}}']
OTHERS += ['{"version": 9, "context": {}, "benchmarks": [], "tables": {}}']


def test_what_is_written_is_read_and_each_list_of_samples_is_on_one_line(tmp_path: Path):
    file = tmp_path / "new" / "found.json"
    recorder = Recorder(file, {"platform": "cpu"})
    recorder.take_in(Results({}, [ONE], {}))
    recorder.row("ledger", model="mlp", words=["a", "b"])
    recorder.exclude("the CNN", "out of memory")
    recorder.write()
    assert '"samples_s": [0.0015, 0.002],' in file.read_text()
    found = results.read(file)
    assert found.benchmarks == [ONE]
    assert found.tables == {"ledger": [{"model": "mlp", "words": ["a", "b"]}]}
    assert found.context["excluded"] == {"the CNN": "out of memory"}
    assert [case.seconds for case in found.cases("train_step", model="mlp")] == [1.5e-3]


@pytest.mark.parametrize("text", OTHERS)
def test_other_files_are_refused_in_one_line(text, tmp_path: Path):
    file = tmp_path / "found.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=r"^cannot read .*found.json as a result file \(.+\)"):
        results.read(file)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(DeviceError, match=r"cannot write .*; choose another --output"):
            Recorder(place, {})
