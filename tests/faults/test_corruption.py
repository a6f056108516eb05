"""A flipped bit, a changed byte or a cut end in any file of a run: detected, or harmless.

Harmless means that what is loaded equals, bit for bit, what was written.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from mnist_jax import Config, fit
from mnist_jax.errors import CheckpointError, MnistJaxError
from mnist_jax.inference.restore import load_run
from mnist_jax.inference.verify import Verify

RUN = ("config.json", "environment.json", "metrics.jsonl", "result.json", "manifest.sha256")
NEWEST = "checkpoints/epoch-0001-step-00000004.safetensors"
FILES = (*RUN, NEWEST, f"{NEWEST}.sha256")


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    sizes = {"epochs": 1, "batch_size": 400, "checkpoint_every": 0, "data_dir": data_dir}
    config = Config(model="logistic", dataset="digits", workdir=workdir, **sizes)
    fit(config)
    return config


def read(config: Config) -> list:
    """What `fit` and the commands read of a complete run."""
    before = (config.workdir / "environment.json").stat()
    again = fit(config)
    assert (config.workdir / "environment.json").stat() == before  # it did not start again
    run = load_run(config.workdir)
    if run.warnings:
        raise CheckpointError(*run.warnings)
    Verify(folder=config.workdir).run()
    params = [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in jax.tree.leaves(run.members)]
    return [again.record, run.config, run.rows, run.step, *params]


def positions(name: str, data: bytes) -> list[Sequence[int]]:
    """A file's positions, grouped by what stands there."""
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(data[:8], "little")
        edges = [0, 8, header, len(data) - 8, len(data)]  # length, header, arrays, their end
        return [range(*pair) for pair in itertools.pairwise(edges)]
    kinds: dict[tuple, list[int]] = {}
    for at, character in enumerate(data.decode()):
        kind = character.isdigit(), character.isalpha(), character.isspace()
        kinds.setdefault(kind, []).append(at)
    return [*kinds.values(), [len(data) - 1]]


@pytest.mark.parametrize("name", FILES)
def test_no_damage_is_loaded_in_silence(name, config, amount, counted):
    path, truth = config.workdir / name, read(config)
    data, rng = path.read_bytes(), random.Random(name)
    kinds = itertools.product(positions(name, data), ("bit", "byte", "end"))
    cases, detected, harmless, silent = amount(15, 600), 0, 0, []
    for places, way in itertools.islice(itertools.cycle(kinds), cases):
        at, rest = rng.choice(places), b""
        if way != "end":
            change = 1 << rng.randrange(8) if way == "bit" else rng.randrange(1, 256)
            rest = bytes([data[at] ^ change]) + data[at + 1 :]
        path.write_bytes(data[:at] + rest)
        try:
            if read(config) == truth:
                harmless += 1
            else:
                silent.append((way, at))
        except MnistJaxError:
            detected += 1
        except Exception as error:  # not a message for the user
            silent.append((way, at, error))
    path.write_bytes(data)
    counts = {"cases": cases, "detected": detected, "harmless": harmless, "silent": len(silent)}
    counted("corruption", file=name, **counts)
    assert not silent
    assert read(config) == truth  # nothing else was changed
