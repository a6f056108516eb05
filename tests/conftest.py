import os
import tempfile
from pathlib import Path

import pytest

# Before JAX is imported: the tests compile the same programs again and again, also in processes of
# their own, and must not share the user's cache. Workers of pytest-xdist take their parent's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="mnist_jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="SIGKILLs in tests/faults, in all")
    parser.addoption("--faults_record", help="file that tests/faults add a line of JSON to, each")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of the four original MNIST files. Tests that use it carry `pytest.mark.mnist`."""
    if not (name := os.environ.get("MNIST_DIR")):
        pytest.skip("set MNIST_DIR to the folder with the four original MNIST files")
    folder = Path(name)
    missing = [name for name in MNIST_FILES if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{folder} lacks {', '.join(missing)}; set MNIST_DIR to the folder of all four")
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for decoded data sets, shared by all tests of a session."""
    return tmp_path_factory.mktemp("data")
