"""A flipped bit, a changed byte or a cut end in any file that is read back: found, or harmless.

Harmless means that what is loaded is, bit for bit, what was written.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mnist_jax import Config
from mnist_jax.atomic_io import IntegrityError
from mnist_jax.data import cache, sources
from mnist_jax.errors import CheckpointError, DataError
from mnist_jax.inference import restore as saved
from mnist_jax.inference.verify import verify
from mnist_jax.runs import run_dir as runs
from mnist_jax.runs.checkpoint import CheckpointManager, names_of

RUN_FILES = (*runs.RECORDS, runs.RESULT, runs.MANIFEST)
VERIFIED = ("epoch-0001-step-00000002.safetensors", "mnist.safetensors")
DIGESTS = tuple(f"{name}.sha256" for name in VERIFIED)
ORIGINALS = tuple(sources.SOURCES["mnist"].files)
FILES = (*RUN_FILES, *VERIFIED, *DIGESTS, *ORIGINALS, *(f"{name} parsed" for name in ORIGINALS))
WAYS = ("bit", "byte", "end")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a finished run."""
    row = {"epoch": 1, "step": 2, "train/loss": 0.25, "test/accuracy": 0.5}
    config = Config(model="logistic", dataset="digits", epochs=1)
    with closing(runs.Run(tmp_path / "run", config)) as run:
        run.write_environment({"python": "3.11.7", "cores": 2, "git_dirty": False})
        run.write_metrics([row])
        run.save(1, 2, arrays(), {"rows": [row]})
        run.finish_saving()
        run.finish({"test_accuracy": 0.5, "config": config.to_json(), "notices": []})
    return run.folder


def arrays() -> dict:
    kernel = np.random.default_rng(1).normal(size=(40, 10)).astype(np.float32)
    return {"kernel": kernel, "step": np.array(2), "sums": {"correct": np.arange(3)}}


def bits(*found: np.ndarray) -> list[tuple]:
    return [(array.dtype, array.shape, array.tobytes()) for array in found]


@pytest.fixture
def readers(folder, tmp_path, monkeypatch) -> dict[str, tuple[Path, Callable[[], list]]]:
    """Where each file is, and what a program gets when it reads it."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "data")
    import small

    splits = small.write(tmp_path)
    monkeypatch.setitem(sources.SOURCES, "mnist", small.source_of(tmp_path))
    cache.write(tmp_path / VERIFIED[1], *splits)

    def run_files() -> list:
        next(verify(folder))  # config and files
        records = [(folder / name).read_bytes() for name in runs.RECORDS]
        return [saved.load_config(folder), runs.read_result(folder), *records]

    def checkpoint() -> list:
        with closing(CheckpointManager(folder / "checkpoints")) as checkpoints:
            found, rest, _ = checkpoints.load(arrays())
        return [rest, *names_of(found), *bits(*names_of(found).values())]

    def decoded() -> list:
        train, test = cache.read(tmp_path / VERIFIED[1])
        return bits(*train, *test)

    def original() -> list:
        return list(sources.read_originals("mnist", tmp_path).items())

    def parsed() -> list:
        train, test = sources.parse({n: (tmp_path / n).read_bytes() for n in ORIGINALS})
        return bits(*train, *test)

    return {
        **{name: (folder / name, run_files) for name in RUN_FILES},
        **{name: (folder / "checkpoints" / name, checkpoint) for name in (VERIFIED[0], DIGESTS[0])},
        **{name: (tmp_path / name, decoded) for name in (VERIFIED[1], DIGESTS[1])},
        **{name: (tmp_path / name, original) for name in ORIGINALS},
        **{f"{name} parsed": (tmp_path / name, parsed) for name in ORIGINALS},
    }


def classes(name: str, data: bytes) -> list[Sequence[int]]:
    """A file's positions, by what stands there."""
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(data[:8], "little")
        edges = [0, 8, header, len(data) - 8, len(data)]  # length, header, arrays, their end
    elif name.endswith(".gz"):
        edges = [0, 10, 15, len(data) - 8, len(data) - 4, len(data)]  # …, checksum, length
    else:
        kinds: dict[tuple, list[int]] = {}
        for at, character in enumerate(data.decode()):
            kind = character.isdigit(), character.isalpha(), character.isspace()
            kinds.setdefault(kind, []).append(at)
        return [*kinds.values(), [len(data) - 1]]
    return [range(*pair) for pair in itertools.pairwise(edges)]


def damaged(data: bytes, at: int, way: str, rng: random.Random) -> bytes:
    if way == "end":
        return data[:at]
    change = 1 << rng.randrange(8) if way == "bit" else rng.randrange(1, 256)
    return data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_no_damage_is_loaded_in_silence(name, readers, amount, counted):
    """Shown to fail with the digest of a checkpoint, of the cache, of a result, of a run's other
    files or of an original left unchecked, and with gzip's own checksum ignored.
    """
    path, load = readers[name]
    data, truth = path.read_bytes(), load()
    rng = random.Random(name)
    kinds = itertools.product(classes(path.name, data), WAYS)
    cases, detected, harmless, silent = amount(60, 600), 0, 0, []
    for positions, way in itertools.islice(itertools.cycle(kinds), cases):
        at = rng.choice(positions)
        path.write_bytes(damaged(data, at, way, rng))
        try:
            if load() == truth:
                harmless += 1
            else:
                silent.append((way, at))
        except (CheckpointError, DataError, IntegrityError):
            detected += 1
        except Exception as error:  # no way to say it
            silent.append((way, at, error))
    counts = {"cases": cases, "detected": detected, "harmless": harmless, "silent": len(silent)}
    counted("corruption", file=name, **counts)
    assert not silent
