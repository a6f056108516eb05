"""Hostile input: whatever the bytes or the words, the answer is right or one of our errors.

Hypothesis makes the inputs, the same ones every time.
"""

import contextlib
import copy
import dataclasses
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import mnist_jax
import train
from mnist_jax import (
    Config,
    __main__,
    checkpoint,
    data,
    environment,
    fit,
    runs,
    saved,
    steps,
    storage,
    verify,
)
from mnist_jax.data import sources
from mnist_jax.errors import DataError, MnistJaxError, UsageError
from mnist_jax.metrics import MetricSums
from mnist_jax.models import MODELS
from mnist_jax.progress import Keeper
from mnist_jax.recipe import make_optimizer
from mnist_jax.signals import Stop
from mnist_jax.steps import TrainState

# Said by Hypothesis when an input fails that is long; the failure matters.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
HANG_S = 5
MAX_GROWTH_BYTES = 500_000_000


class HangError(BaseException):
    """Not an Exception, so that nothing under test can catch it."""


def ring(*_: object) -> None:
    raise HangError(f"no answer in {HANG_S} s")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def fuzz(amount, counted, monkeypatch):
    """(what, inputs, use, quick, full): calls `use` with that many inputs; it must never raise."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk would take most of the time

    def run(what, inputs, use, quick, full):
        tried = tracebacks = 0
        slowest_s, before = 0.0, peak_bytes()

        @hypothesis.settings(
            max_examples=amount(quick, full),
            derandomize=True,
            database=None,
            verbosity=hypothesis.Verbosity.quiet,  # some inputs are too long to be shown
            deadline=1000 * HANG_S,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(inputs)
        def each(value):
            nonlocal tried, tracebacks, slowest_s
            tried += 1
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            try:
                use(value)
            except BaseException as error:
                tracebacks += 1
                error.add_note(f"input: {value!r:.2000}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                slowest_s = max(slowest_s, time.monotonic() - started)

        former = signal.signal(signal.SIGALRM, ring)
        try:
            each()
        finally:
            signal.signal(signal.SIGALRM, former)
            grew = peak_bytes() - before
            counts = {"inputs": tried, "tracebacks": tracebacks, "grew_mb": grew // 10**6}
            counted("fuzz", what=what, **counts, slowest_s=round(slowest_s, 2))
        assert tried >= amount(quick, full)
        assert grew < MAX_GROWTH_BYTES

    return run


def mostly(usual: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> Any:
    """Half the time, and else one of the others."""
    return st.booleans().flatmap(lambda other: st.one_of(others) if other else usual)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """`valid` with bytes replaced, removed and put in, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(valid)))
        end = begin + draw(st.sampled_from((0, 1, 2, 8, len(valid))))
        valid = valid[:begin] + draw(st.binary(max_size=8)) + valid[end:]
    return valid


# IDX and gzip


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


NAMES = (sources.TRAIN_IMAGES, sources.TRAIN_LABELS, sources.TEST_IMAGES, sources.TEST_LABELS)
PIXELS = np.arange(3 * 28 * 28).reshape(3, 28, 28)
IDX = dict(zip(NAMES, map(idx, (PIXELS, np.arange(3), PIXELS[:2], np.arange(2))), strict=True))
ZEROS = packed(bytes(10_000_000))
HEADERS = st.builds(
    lambda magic, shape, rest: struct.pack(f">{1 + len(shape)}I", magic, *shape) + rest,
    st.sampled_from((0x0801, 0x0803, 0x0D03)) | st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from((0, 1, 2, 3, 28, 2**31, 2**32 - 1)), max_size=6),
    st.binary(max_size=20),
)


def idx_files(name: str) -> st.SearchStrategy[tuple[str, bytes, int]]:
    """A file's name, what is in it, and how often 10 MB of zeros follow."""
    content = (
        st.binary()
        | (st.binary() | mutated(IDX[name]) | HEADERS | st.just(IDX[name])).map(packed)
        | mutated(packed(IDX[name]))
    )
    return st.tuples(st.just(name), content, st.sampled_from((0, 0, 0, 1, 100)))


def test_idx_files(fuzz, monkeypatch):
    source = sources.SOURCES["mnist"]._replace(train_count=3, test_count=2)
    monkeypatch.setitem(sources.SOURCES, "small", source)
    valid = {name: packed(content) for name, content in IDX.items()}

    def use(file):
        name, content, zeros = file
        files = {**valid, name: content + zeros * ZEROS}
        with contextlib.suppress(DataError):
            train, test = sources.parse("small", files)
            arrays = (train.image[..., 0], train.label, test.image[..., 0], test.label)
            assert list(map(idx, arrays)) == [gzip.decompress(files[name]) for name in NAMES]

    fuzz("IDX and gzip", st.sampled_from(NAMES).flatmap(idx_files), use, 500, 8000)


# JSON

ODD_NUMBERS = (-1, 0, 2**31, 2**63, 10**9, 10**30, 10**400, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "..", "../../x", "~\0", "a\0", "~nobody/x", "\ud800", "a\nb", "\x1b[2J", "gpu")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from((*ODD_NUMBERS, *ODD_TEXTS)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
# Too deep to read, nearly so, and a number of more digits than Python reads.
DEEP = st.sampled_from([b"[" * n + b"]" * n for n in (100, 900, 99_999)] + [b"9" * 5000])


@st.composite
def changed(draw, valid: Any) -> Any:
    """A JSON value with one at some depth replaced, removed or added."""
    if not isinstance(valid, dict | list) or not valid or draw(st.integers(0, 3)) == 3:
        like = ODD_TEXTS if isinstance(valid, str) else ODD_NUMBERS
        return draw(mostly(st.sampled_from(like), JSON))
    key = draw(st.sampled_from(sorted(valid) if isinstance(valid, dict) else range(len(valid))))
    how, valid = draw(st.sampled_from(("change", "remove", "add"))), copy.copy(valid)
    if how == "remove":
        del valid[key]
    elif how == "add" and isinstance(valid, dict):
        valid[draw(st.text(max_size=9))] = draw(JSON)
    else:
        valid[key] = draw(changed(valid[key]))
    return valid


def json_files(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """What might stand in the place of a file of these values."""
    once = changed(valid)
    values = (once | once.flatmap(changed)).map(lambda value: json.dumps(value).encode())
    deeper = st.builds(
        lambda key, deep: json.dumps({**valid, key: "@"}).encode().replace(b'"@"', deep),
        *(st.sampled_from(sorted(valid)), DEEP),
    )
    return mostly(values, deeper, DEEP, mutated(json.dumps(valid).encode()))


# A run's folder

BITS = {"BOOL": 8, "F4": 4, "F8_E4M3": 8, "BF16": 16, "F32": 32, "I32": 32, "F64": 64, "C64": 64}


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """What is in a safetensors file: its header, and behind it the arrays."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def checkpoint_files(valid: bytes) -> st.SearchStrategy[bytes]:
    header, body = parts(valid)
    rest = json.loads(header["__metadata__"]["rest"])

    def of(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + body

    def with_value(name: str, value: Any) -> bytes:
        return of(json.dumps({**header, name: value}).encode())

    def with_rest(text: bytes) -> bytes:
        rest = text.decode(errors="replace")
        return with_value("__metadata__", {**header["__metadata__"], "rest": rest})

    def with_array(name: str, dtype: str, shape: list[int]) -> bytes:
        begin, end = header.get(name, {"data_offsets": [len(body)] * 2})["data_offsets"]
        shape = [*shape, (end - begin) * 8 // BITS[dtype]]
        return with_value(name, {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})

    def with_name_twice(two: tuple[str, Any]) -> bytes:
        return of(f"{json.dumps(dict([two]))[:-1]},{json.dumps(header)[1:]}".encode())

    names = st.sampled_from(sorted(header.keys() - {"__metadata__"}))
    shapes = st.lists(st.sampled_from((0, 1, 2**40)), max_size=3) | st.just([1] * 100)
    rows = changed(rest["rows"]).map(lambda rows: json.dumps({**rest, "rows": rows}).encode())
    pairs = st.sampled_from(sorted(header)).flatmap(
        lambda name: st.tuples(st.just(name), changed(header[name]))
    )
    return mostly(
        (json_files(rest) | rows).map(with_rest)
        | st.builds(with_array, names | st.text(), st.sampled_from(sorted(BITS)), shapes),
        changed(header["__metadata__"]).map(lambda value: with_value("__metadata__", value)),
        (json_files(header) | mutated(json.dumps(header).encode())).map(of),
        pairs.map(with_name_twice),
        mutated(valid),
    )


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory, request) -> Path:
    """The folder of a complete run, of an ensemble where the test asks for one."""
    seeds = getattr(request, "param", None)
    where = {"data_dir": data_dir, "workdir": tmp_path_factory.mktemp("whole") / "run"}
    return fit(Config(model="logistic", dataset="digits", epochs=3, seeds=seeds, **where)).workdir


def huge(path: Path) -> None:
    """A file that would be seen in memory; on the disk it takes no place."""
    with path.open("wb") as file:
        file.truncate(2 * MAX_GROWTH_BYTES)


ODDITIES = {
    "nothing": lambda path, original: None,
    "folder": lambda path, original: path.mkdir(),
    "pipe": lambda path, original: os.mkfifo(path),
    "loop": lambda path, original: path.symlink_to(path.name),
    "device": lambda path, original: path.symlink_to("/dev/zero"),
    "link": lambda path, original: path.symlink_to(original),
    "huge": lambda path, original: huge(path),
    "bytes": lambda path, original: path.write_bytes(b"\xff" * 30),
}
ODD_FILES = st.sampled_from(sorted(ODDITIES))
FILE_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=60)
CHECKPOINT_NAMES = (
    st.builds("epoch-{:04d}-step-{:08d}.safetensors".format, *[st.integers(0, 10**12)] * 2)
    | FILE_NAMES.map("epoch-0009-step-00000099.safetensors{}".format)
    | FILE_NAMES.map(".{}.tmp".format)
).map("checkpoints/{}".format)
RECORDS = (*runs.RECORDS, runs.RESULT, runs.MANIFEST)


def changes(what: str, whole: Path) -> st.SearchStrategy[tuple[str, bytes | str]]:
    """A place in a run's folder, and what to put there."""

    def valid(name: str) -> bytes:
        return (whole / name).read_bytes()

    def at(place: str, *contents: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.tuples(st.just(place), st.one_of(contents))

    newest = max(whole.glob("checkpoints/*.safetensors")).relative_to(whole).as_posix()
    digest = f"{newest}.sha256"
    config, environment, result = (
        json.loads(valid(f"{name}.json")) for name in ("config", "environment", "result")
    )
    small = {"model": "mlp", "hidden_sizes": [8, 9], "seeds": 2, "workdir": "x"}
    row = json.loads(valid("metrics.jsonl").splitlines()[0])
    rows = st.lists(json_files(row), max_size=4).map(b"\n".join)
    more = (".pid", ".lock", "checkpoints", "checkpoints/.x.tmp", "checkpoints/x.safetensors")
    return {
        "odd files": st.tuples(st.sampled_from((*RECORDS, newest, digest, *more)), ODD_FILES),
        "checkpoints": mostly(
            at(newest, checkpoint_files(valid(newest))),
            at(digest, mutated(valid(digest))),
            st.tuples(CHECKPOINT_NAMES, st.just(valid(newest)) | st.binary() | ODD_FILES),
        ),
        "config files": at("config.json", json_files(config), json_files(small)),
        "result files": mostly(
            at("result.json", json_files(result)),
            at("environment.json", json_files(environment)),
            at("metrics.jsonl", rows, mutated(valid("metrics.jsonl"))),
            at("manifest.sha256", mutated(valid("manifest.sha256"))),
        ),
    }[what]


def cleared(path: Path) -> Path:
    """The path, with nothing there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def set_digests_right(folder: Path) -> None:
    """As somebody does who wants a file to be believed."""

    def write(digests: Path, *paths: Path) -> None:
        small = [path for path in paths if path.is_file() and path.stat().st_size < 10**6]
        lines = storage.digest_lines({path.name: path.read_bytes() for path in small})
        cleared(digests).write_bytes(lines)

    for path in folder.glob("checkpoints/*.safetensors"):
        write(storage.digest_path(path), path)
    write(folder / runs.MANIFEST, *(folder / name for name in RECORDS[:-1]))


def assert_true(run: saved.SavedRun, like: TrainState) -> None:
    """What was loaded is what stands in the newest file that no notice names."""
    assert jax.tree.map(np.shape, run.progress.state) == jax.tree.map(np.shape, like)
    path = checkpoint.Checkpoints(run.folder / "checkpoints")._paths()[len(run.notices)]
    content = path.read_bytes()
    assert not path.is_symlink() and not path.parent.is_symlink()
    assert hashlib.sha256(content).hexdigest() in storage.digest_path(path).read_text()
    header, body = parts(content)
    for name, leaf in checkpoint.names_of(run.progress.split()[0]).items():
        begin, end = header[name]["data_offsets"]
        assert leaf.tobytes() == body[begin:end]


def bytes_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("whole", "what"),
    [
        *((None, what) for what in ("checkpoints", "config files", "result files", "odd files")),
        *((2, what) for what in ("checkpoints", "result files")),
    ],
    indirect=["whole"],
)
def test_a_run_s_folder(what, fuzz, whole, tmp_path, monkeypatch):
    config, result = saved.load_config(whole), runs.read_result(whole) or {}
    sums = SimpleNamespace(correct=np.array(result["test_correct"]), count=result["test_count"])
    monkeypatch.setattr(saved, "evaluate", lambda *_: sums)
    monkeypatch.setattr(verify, "load_dataset", lambda *_, **__: SimpleNamespace(test=None))
    monkeypatch.setattr(environment, "describe", lambda device: result["environment"])
    init = partial(steps.init_state, model=MODELS[config.model](), tx=make_optimizer(config, 1))
    keys = jnp.stack([jax.random.key(seed) for seed in config.all_seeds()])
    key, start = (keys[0], init(keys[0])) if config.seeds is None else (keys, jax.vmap(init)(keys))
    folder, before = tmp_path / "run", bytes_in(whole)

    def resume(config: Config) -> None:
        with contextlib.closing(runs.Run(folder, config)) as run:
            Keeper(run, config, Stop(), key).restore(start, MetricSums.zeros(config.seeds))

    readers = (
        lambda: assert_true(saved.load_run(folder), start),
        lambda: list(verify.verify(folder)),
        lambda: resume(saved.load_config(folder)),
        lambda: resume(config),  # writes the metrics of the checkpoint
        lambda: list(verify.verify(folder)),
    )

    def use(files_and_right):
        files, right = files_and_right
        shutil.copytree(whole, cleared(folder))
        # What is in a folder goes first: the folder may become a link.
        for place, content in sorted(files, key=lambda file: -len(Path(file[0]).parts)):
            path = cleared(folder / place)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                ODDITIES[content](path, whole / place)
        if right:
            set_digests_right(folder)
        for read in readers:
            with contextlib.suppress(MnistJaxError):
                read()

    files = st.lists(changes(what, whole), min_size=1, max_size=2)
    inputs = st.tuples(files, mostly(st.just(True), st.booleans()))
    fuzz(f"{what} of an ensemble" if config.seeds else what, inputs, use, 150, 1500)
    assert bytes_in(whole) == before  # where links lead


# Command lines

LEGAL = ("mlp", "digits", "post", "auto", "cpu", "1", "2 3", "0.5", "None")
ODD_WORDS = ("--", "-", "-1", "=", "9" * 5000, "1e400", "nan", "-inf", "-x", "--help", "-h")
LIKE_TYROS = ("Error parsing --x", "Missing value for argument '--x'", "Unrecognized options: x")
ODD_VALUES = st.sampled_from((*ODD_WORDS, *LIKE_TYROS, *ODD_TEXTS)) | st.text(max_size=9)
VALUES = mostly(st.sampled_from(LEGAL), ODD_VALUES)


def lines(kind: type) -> st.SearchStrategy[list[str]]:
    """Words for a command with the flags of a dataclass."""
    names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
    spelt = names.map("--{}".format) | names.map(lambda name: "--" + name.replace("_", "-"))
    misspelt = st.builds(
        lambda name, at, letter: f"--{name[:at]}{letter}{name[at + 1 :]}",
        *(names, st.integers(0, 9), st.text(max_size=1)),
    ) | st.builds("{}{}".format, st.sampled_from(("--no_", "--no-", "-", "---")), names)
    flags = mostly(spelt, spelt, misspelt)
    pairs = st.builds("{}={}".format, flags, VALUES)
    return st.lists(mostly(pairs, flags, VALUES), max_size=6)


def test_command_lines(fuzz, monkeypatch):
    def no_runs(*folders, **_):
        raise UsageError("none of them holds a run")

    split = SimpleNamespace(label=())
    dataset = SimpleNamespace(name="", source="", notices=(), train=split, test=split)
    monkeypatch.setattr(mnist_jax, "fit", lambda config, **_: None)
    monkeypatch.setattr(verify, "verify", lambda folder, **_: ())
    monkeypatch.setattr(data, "load_dataset", lambda name, **_: dataset)
    monkeypatch.setattr(__main__._Evaluating, "predict", no_runs)

    def use(main_and_words):
        main, words = main_and_words
        told = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            try:
                status = main(words)
            except SystemExit as stop:
                assert not stop.code  # after --help
                status = 0
        lines = told.getvalue().split("\n")
        if main is train.main and "--debug" in words:  # asks for the traceback
            del lines[:-2]
        assert status in (0, 2)
        if status == 0:
            assert lines == [""]
        else:
            assert len(lines) == 2
            assert lines[0].startswith("error: ")
            assert "this is a bug" not in lines[0]

    commands = [
        st.tuples(st.just(__main__.main), lines(kind).map(lambda words, name=name: [name, *words]))
        for name, kind in __main__.COMMANDS.items()
    ]
    any_name = st.tuples(st.just(__main__.main), st.lists(VALUES, max_size=3))
    training = st.tuples(st.just(train.main), lines(Config))
    fuzz("command lines", mostly(training, *commands, any_name), use, 400, 5000)
