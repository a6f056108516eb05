import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import pytest

# Before JAX is imported: the tests compile the same programs again and again, also in processes of
# their own, and must not share the user's cache. Workers of pytest-xdist take their parent's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="mnist_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the long tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--campaign"):
        for item in items:
            if item.get_closest_marker("campaign"):
                item.add_marker(pytest.mark.skip(reason="runs with --campaign"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """(name, make) → the value of `make(folder)`, which JSON can hold; the folder has that name.

    The first worker of the session that asks makes it; the others wait for it.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made_once(name: str, make: Callable[[Path], Any]) -> Any:
        file = shared / f"{name}.json"
        with filelock.FileLock(shared / f"{name}.lock"):
            if not file.exists():
                folder = shared / name
                folder.mkdir()
                file.write_text(json.dumps(make(folder), default=str))
        return json.loads(file.read_text())

    return made_once


@pytest.fixture(scope="session")
def data_dir(once: Callable[..., Any]) -> Path:
    """One folder for decoded data sets, shared by all tests and workers of a session."""
    return Path(once("data", str))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection and every look-up of a name fails."""
    refuse = mock.Mock(side_effect=OSError(101, "Network is unreachable"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def mnist_dir(once: Callable[..., Any]) -> Path:
    """The folder of the original MNIST files. Tests that use it carry `pytest.mark.mnist`."""
    from mnist_jax import load_dataset

    if not (name := os.environ.get("MNIST_DIR")):
        pytest.skip("set MNIST_DIR to the folder with the four original MNIST files")
    folder = Path(name)
    load_dataset("mnist", data_dir=once("data", str), manual_dir=folder)
    return folder


# Runs on the digits, of three epochs of logistic regression.
RUNS = {
    "one": {"seed": 5, "validation": 100},
    "many": {"seeds": 3},
    "worse": {"seeds": 3, "learning_rate": 1e-5},
    "grid": {"seeds": 2, "learning_rate": (1e-5, 0.01)},
}


@pytest.fixture(scope="session")
def runs(once: Callable[..., Any], data_dir: Path) -> Path:
    """A folder of complete runs, by the names of `RUNS`. Tests do not change it."""
    from mnist_jax import Config, fit

    def make(folder: Path) -> Path:
        same = {"model": "logistic", "dataset": "digits", "epochs": 3, "data_dir": data_dir}
        for name, fields in RUNS.items():
            fit(Config(workdir=folder / name, **same, **fields))
        return folder

    return Path(once("runs", make))


@pytest.fixture
def config(data_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a Config of a quick run, in the folder "run" of the test."""
    from mnist_jax import Config

    run = {"model": "logistic", "dataset": "digits", "epochs": 2, "data_dir": data_dir}
    return lambda **fields: Config(**{**run, "workdir": tmp_path / "run", **fields})
