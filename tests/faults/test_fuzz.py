"""Random and damaged input: the answer is right, or one of our errors, within seconds."""

import contextlib
import dataclasses
import gzip
import io
import json
import resource
import signal
import struct
import time
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import pytest
import small
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import train
from mnist_jax import Config, __main__
from mnist_jax.data import DataSpec, sources
from mnist_jax.errors import DataError, MnistJaxError, UsageError
from mnist_jax.inference import preprocess
from mnist_jax.runs.run_dir import read_config

# Hypothesis warns of a failing input that is long; the failure itself matters.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
HANG_S, MAX_GROWTH_BYTES = 5, 500_000_000
SETTINGS = {"derandomize": True, "database": None, "deadline": None}
SETTINGS |= {"suppress_health_check": list(hypothesis.HealthCheck)}
ODD_NUMBERS = (-1, 0, 2**31, 2**63, 10**9, 10**30, 10**400, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "..", "../../x", "~\0", "a\0", "~nobody/x", "\ud800", "a\nb", "\x1b[2J", "gpu")


class HangError(BaseException):
    """Not an Exception, so that the code under test cannot catch it."""


def ring(*_: object) -> None:
    raise HangError(f"no answer in {HANG_S} s")


@pytest.fixture
def fuzz(amount, counted):
    """(what, inputs, use, quick, full): calls `use` with that many inputs; it must never raise."""

    def run(what, inputs, use, quick, full):
        tried, slowest_s = 0, 0.0
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @hypothesis.settings(max_examples=amount(quick, full), **SETTINGS)
        @hypothesis.given(inputs)
        def each(value):
            nonlocal tried, slowest_s
            tried, started = tried + 1, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
            try:
                use(value)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                slowest_s = max(slowest_s, time.monotonic() - started)

        try:
            each()
        finally:
            grew = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb)
            counts = {"inputs": tried, "grew_mb": grew // 10**6, "slowest_s": round(slowest_s, 2)}
            counted("fuzz", what=what, **counts)
        assert grew < MAX_GROWTH_BYTES

    former = signal.signal(signal.SIGALRM, ring)
    yield run
    signal.signal(signal.SIGALRM, former)


def mostly(ordinary: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> Any:
    return st.booleans().flatmap(lambda other: st.one_of(others) if other else ordinary)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(valid)))
        end = begin + draw(st.sampled_from((0, 1, 2, 8, len(valid))))
        valid = valid[:begin] + draw(st.binary(max_size=8)) + valid[end:]
    return valid


HEADERS = st.builds(
    lambda magic, shape, rest: struct.pack(f">{1 + len(shape)}I", magic, *shape) + rest,
    st.sampled_from((0x0801, 0x0803, 0x0D03)) | st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from((0, 1, 2, 3, 28, 2**31, 2**32 - 1)), max_size=6),
    st.binary(max_size=20),
)


def test_idx_files(fuzz):
    def use(content):
        with contextlib.suppress(DataError):
            array = sources.read_idx("x.gz", content)
            assert gzip.decompress(content).endswith(array.tobytes())

    images = small.idx(np.arange(3 * 28 * 28).astype(np.uint8).reshape(3, 28, 28))
    unpacked = st.binary() | mutated(images) | HEADERS | st.just(images)
    content = st.binary() | unpacked.map(gzip.compress) | mutated(gzip.compress(images, mtime=0))
    fuzz("IDX and gzip", content, use, 150, 8000)


def pictures() -> st.SearchStrategy[bytes]:
    drawn = Image.new("L", (40, 30), 200)
    ImageDraw.Draw(drawn).line([(10, 5), (25, 5), (15, 25)], 20, 3)
    kinds = [
        *((drawn, kind, {}) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")),
        (drawn.convert("CMYK"), "JPEG", {"progressive": True}),
        (drawn.convert("RGB").quantize(8), "PNG", {"transparency": 3}),
        (drawn.convert("LA"), "PNG", {}),
    ]
    files = [io.BytesIO() for _ in kinds]
    for file, (picture, kind, options) in zip(files, kinds, strict=True):
        picture.save(file, kind, **options)
    valid = st.sampled_from([file.getvalue() for file in files])
    return mostly(valid.flatmap(mutated), valid.flatmap(mutated).flatmap(mutated), valid)


def test_pictures(fuzz, tmp_path):
    def use(content):
        (tmp_path / "picture").write_bytes(content)
        try:
            image = preprocess.to_mnist(preprocess.read_image(tmp_path / "picture")).image
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert (image.shape, image.dtype, image.max()) == ((28, 28, 1), np.uint8, 255)

    fuzz("pictures", pictures(), use, 100, 20_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ODD_NUMBERS)
    | st.text(max_size=20) | st.sampled_from(ODD_TEXTS),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)  # fmt: skip
# Too deep to read, nearly so, and a number with more digits than Python reads.
DEEP = st.sampled_from([b"[" * n + b"]" * n for n in (100, 900, 99_999)] + [b"9" * 5000])


def test_configs(fuzz, tmp_path):
    """config.json is the only file of a run that is read without a digest."""
    valid = Config(model="mlp", seeds=2, data_dir=tmp_path).resolve().to_json()
    valid["data"] = DataSpec("digits", (28, 28, 1), tuple("0123456789"))._asdict()
    names = st.sampled_from(sorted(valid)) | st.text(max_size=9)
    values = st.dictionaries(names, JSON, min_size=1, max_size=2)
    contents = values.map(lambda changed: json.dumps({**valid, **changed}).encode())

    def use(content):
        (tmp_path / "config.json").write_bytes(content)
        try:
            config, _ = read_config(tmp_path)
        except MnistJaxError as error:
            assert "\n" not in str(error)
        else:
            config.resolve().hyperparameters()

    fuzz("configs", mostly(contents, DEEP, mutated(json.dumps(valid).encode())), use, 150, 8000)


LEGAL = ("mlp", "digits", "tutorial", "auto", "cpu", "1", "2 3", "0.5", "None")
ODD_WORDS = ("--", "-", "-1", "=", "9" * 5000, "1e400", "nan", "-inf", "-x", "--help", "-h")
ODD = st.sampled_from((*ODD_WORDS, *ODD_TEXTS)) | st.text(max_size=9)
VALUES = mostly(st.sampled_from(LEGAL), ODD.filter(lambda word: "\0" not in word))  # as argv


def command_lines(kind: type) -> st.SearchStrategy[list[str]]:
    names = st.sampled_from([field.name for field in dataclasses.fields(kind)])
    flags = st.builds("{}{}".format, mostly(st.just("--"), st.sampled_from(("--no_", "-"))), names)
    return st.lists(mostly(st.builds("{}={}".format, flags, VALUES), flags, VALUES), max_size=6)


def test_command_lines(fuzz, tmp_path, monkeypatch, no_network):
    """Runs in an empty folder without a network, so that no command but training can do much."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    stub = mock.Mock(side_effect=UsageError("not here"))
    monkeypatch.setattr("mnist_jax.training.make_mesh", stub)
    monkeypatch.setattr("socket.create_server", stub)

    def use(main_and_words):
        main, words = main_and_words
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as stop:  # tyro's: its help, or its own message
                assert stop.code in (None, 0, 2)
                return
        *warnings, last = [line for line in err.getvalue().split("\n") if line] or [""]
        assert status in (0, 2, 3, 4, 6), last
        if "--debug" not in words:
            own = "warning: ", "error: ", "no run is named"  # predict has a line for each picture
            assert all(line.startswith(own) for line in warnings)
            assert last.startswith("error: ") if status else not last or "warning: " in last

    training = st.tuples(st.just(train.main), command_lines(Config))
    others = [st.lists(VALUES, max_size=3)]
    for name in __main__.COMMANDS:
        lines = command_lines(__main__._load(name))
        others.append(lines.map(lambda words, name=name: [name, *words]))
    commands = st.tuples(st.just(__main__.main), st.one_of(others))
    fuzz("command lines", mostly(training, commands), use, 150, 5000)
