import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from mnist_jax import __main__, atomic_io, load_dataset
from mnist_jax.data import Split


@pytest.fixture(scope="session")
def split(data_dir: Path) -> Split:
    return load_dataset("digits", data_dir=data_dir).test


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, split: Split) -> list[Path]:
    """Pictures of digits in one folder, named after what they show: black on white, 84 × 84."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for place, (image, label) in enumerate(zip(split.image[:36], split.label[:36], strict=True)):
        paths.append(folder / f"{place:02d} is {label}.png")
        Image.fromarray(255 - image[..., 0]).resize((84, 84)).save(paths[-1])
    return paths


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(runs / name, tmp_path / name)


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
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
