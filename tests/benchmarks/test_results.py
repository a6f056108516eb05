import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Benchmark
from mnist_jax.errors import DataError, DeviceError

ROOT = Path(__file__).resolve().parents[2]


def make(**changes) -> Benchmark:
    fields = {
        "name": "train_step",
        "framework": "mnist_jax",
        "model": "mlp",
        "batch_size": 100,
        "precision": "float32",
        "mode": "many steps a call",
        "details": {"round": 0},
    }
    return Benchmark.of([0.002, 0.001, 0.003], [1.0], **(fields | changes))


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "new" / "peers.json"
    results.check_writable(path)
    results.write(path, {"cores": 2}, [make(), make(model="cnn")])
    context, benchmarks, _ = results.read(path)
    assert context["cores"] == 2
    assert context["date"].endswith("+00:00")
    assert benchmarks == [make(), make(model="cnn")]
    assert benchmarks[0].median_s == 0.002
    content = json.loads(path.read_text())
    assert set(content) == {"version", "context", "benchmarks", "tables"}
    assert content["benchmarks"][0]["warmup_s"] == [1.0]


def spoil(entry: dict) -> str:
    benchmark = {**dataclasses.asdict(make()), **entry}
    return json.dumps({"version": results.VERSION, "context": {}, "benchmarks": [benchmark]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (spoil({})[:-20], "truncated or not JSON"),
        ("", "truncated or not JSON"),
        ("[1, 2]", "not a result file"),
        ('{"test_accuracy": 0.92}', "not a result file"),
        ('{"version": 2, "context": {}, "benchmarks": []}', "of version 2; this program reads 1"),
        ('{"version": 1, "benchmarks": []}', "damaged.*context"),
        (spoil({"samples": []}), "damaged.*samples"),
        (spoil({"samples_s": []}), "damaged.*samples_s"),
        (spoil({"samples_s": ["fast"]}), "damaged"),
        (spoil({"model": 7}), "damaged.*model is 7"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str):
    path = tmp_path / "peers.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        results.read(path)
    assert caught.value.exit_status == 3
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        results.read(tmp_path / "absent.json")


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "peers.json", tmp_path):
        with pytest.raises(DeviceError, match="cannot write"):
            results.check_writable(path)


def test_the_harness_needs_no_jax_and_the_package_no_benchmarks():
    script = "import sys, benchmarks.timing, benchmarks.peer_workers.job; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jax", "mnist_jax", "flax"} & set(done.stdout.split())
    for path in ROOT.glob("mnist_jax/**/*.py"):
        assert "benchmarks" not in path.read_text(), path
