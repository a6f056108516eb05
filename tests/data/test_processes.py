"""Several processes at once, and processes killed half-way: real ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
import small

from mnist_jax.data import cache, load_dataset, sources
from mnist_jax.errors import DataError

pytest.importorskip("tensorflow_datasets")

COUNTS = {"train_count": 2_000, "test_count": 500}

PRELUDE = """
import hashlib, sys, time
from pathlib import Path
from mnist_jax import atomic_io as storage
from mnist_jax.data import load_dataset, sources
import small
import PIL.Image, tensorflow_datasets
folder, data_dir = map(Path, sys.argv[1:])
sources.SOURCES["mnist"] = small.source_of(folder, train_count=2000, test_count=500)

def halt(*args, **kwargs):
    print("half-way", file=sys.__stdout__, flush=True)  # stdout is silenced around tfds
    time.sleep(60)
"""

LOAD = """
dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=folder)
digest = hashlib.sha256(b"".join(a.tobytes() for a in (*dataset.train, *dataset.test)))
print(digest.hexdigest(), dataset.source.split()[0], len(dataset.notices))
"""


def start(code: str, folder: Path, data_dir: Path) -> subprocess.Popen[str]:
    here = Path(small.__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, folder, data_dir],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.write(tmp_path / "originals", **COUNTS)
    return tmp_path / "originals"


def test_processes_that_start_together_prepare_once_and_agree(folder, data_dir, tmp_path):
    go = f"""
print("ready", flush=True)
while not Path({str(tmp_path / "go")!r}).exists(): time.sleep(0.005)
"""
    processes = [start(go + LOAD, folder, data_dir) for _ in range(3)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({digest for digest, _, _ in results}) == 1
    assert sorted(source for _, source, _ in results) == ["decoded", "decoded", "original"]
    assert {notices for _, _, notices in results} == {"0"}


@pytest.mark.parametrize(
    "interruption",
    [
        pytest.param("PIL.Image.Image.save = halt", id="preparing"),
        pytest.param("Path.rename = halt", id="moving-into-place"),
        pytest.param("storage.write_verified = halt", id="before-the-cache"),
        pytest.param("Path.replace = halt", id="writing-the-cache"),
    ],
)
def test_after_a_kill_the_next_start_just_works(folder, data_dir, interruption, monkeypatch):
    process = start(interruption + LOAD, folder, data_dir)
    assert process.stdout
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    small_mnist = small.source_of(folder, **COUNTS)
    monkeypatch.setitem(sources.SOURCES, "mnist", small_mnist)
    dataset = load_dataset("mnist", data_dir=data_dir, manual_dir=folder)
    truth = small.write(folder, **COUNTS)
    np.testing.assert_array_equal(dataset.train.image, truth[0].image)
    np.testing.assert_array_equal(dataset.test.label, truth[1].label)
    assert dataset.notices == ()
    left = {str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith("mnist/")} == {
        ".mnist.lock",
        "decoded/mnist-3.0.1.safetensors",
        "decoded/mnist-3.0.1.safetensors.sha256",
    }
    assert [path.name for path in (data_dir / "mnist").iterdir()] == ["3.0.1"]
    assert not (data_dir / ".preparing-mnist").exists()


def test_a_lock_that_is_never_given_up_is_an_error_with_an_end(originals, data_dir, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.2)
    data_dir.mkdir()
    with (
        filelock.FileLock(data_dir / ".mnist.lock"),
        pytest.raises(DataError, match="another process has been preparing mnist"),
    ):
        load_dataset("mnist", data_dir=data_dir, manual_dir=originals)
