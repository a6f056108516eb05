import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mnist_jax import Config, __main__, atomic_io, fit

RUNS = {
    "one": {"model": "logistic", "seed": 5},
    "many": {"model": "logistic", "seeds": 3},
    "worse": {"model": "logistic", "seeds": 3, "learning_rate": 1e-5},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A folder of complete runs on the digits, by the names of `RUNS`. Tests do not change it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, fields in RUNS.items():
        fit(Config(dataset="digits", epochs=3, data_dir=data_dir, workdir=folder / name, **fields))
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Name → a copy of that run, to be changed."""
    return lambda name: shutil.copytree(runs / name, tmp_path / name)


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Words of a command line → exit status, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        status = __main__.main(list(map(str, words)))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def edit_params() -> Callable[[Path, Callable[[str, np.ndarray], None]], None]:
    """(folder, change) → calls `change(name, array)` on each parameter of the newest checkpoint."""

    def edit(folder: Path, change: Callable[[str, np.ndarray], None]) -> None:
        path = max((folder / "checkpoints").glob("*.safetensors"))
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        arrays = safetensors.numpy.load_file(path)
        for name, array in arrays.items():
            if "params" in name.split("/"):
                change(name, array)
        atomic_io.write_verified(path, safetensors.numpy.save(arrays, metadata))

    return edit
