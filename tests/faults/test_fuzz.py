"""Hostile input: whatever the bytes or the words, the answer is right or one of our errors.

Hypothesis makes the inputs, the same ones every time. Shown to fail with no limit to what gzip
unpacks to, zlib.error or RecursionError not caught, pipes opened, a digest not compared, a linked
checkpoint followed, a checkpoint's fields, numbers or losses not checked, nor its types and shapes
that NumPy lacks, a result's fields taken for granted, a decoder's error or warning not caught, the
size of a picture not looked at, and tyro's SystemExit let through.
"""

import contextlib
import gzip
import hashlib
import io
import os
import resource
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hostile
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from mnist_jax.commands import COMMANDS
from mnist_jax.parallel.team import Team
from mnist_jax.runs.progress import Keeper

import mnist_jax
import train
from mnist_jax import Config, __main__, data, fit, steps
from mnist_jax import atomic_io as storage
from mnist_jax.data import sources
from mnist_jax.errors import DataError, MnistJaxError, UsageError
from mnist_jax.inference import preprocess as images
from mnist_jax.inference import restore as saved
from mnist_jax.inference import verify
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel.mesh import Layout
from mnist_jax.runs import checkpoint, environment
from mnist_jax.runs import run_dir as runs
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


def test_idx_files(fuzz):
    valid = {name: hostile.packed(content) for name, content in hostile.IDX.items()}

    def use(file):
        name, content, zeros = file
        files = {**valid, name: content + zeros * hostile.ZEROS}
        with contextlib.suppress(DataError):
            train, test = sources.parse(files)
            arrays = (train.image[..., 0], train.label, test.image[..., 0], test.label)
            for name, array in zip(hostile.NAMES, arrays, strict=True):
                assert hostile.idx(array) == gzip.decompress(files[name])

    fuzz("IDX and gzip", st.sampled_from(hostile.NAMES).flatmap(hostile.idx_files), use, 500, 8000)


def test_pictures(fuzz, tmp_path):
    def use(content):
        hostile.cleared(tmp_path / "picture").write_bytes(content)
        try:
            grey = images.read_image(tmp_path / "picture")
            assert grey.dtype == np.float32 and grey.ndim == 2 and max(grey.shape) <= 1024
            assert grey.min() >= 0 and grey.max() <= 255.001
            image = images.to_mnist(grey).image
        except DataError as error:
            assert "\n" not in str(error).replace(str(tmp_path), "")
        else:
            assert (image.shape, image.dtype, image.max()) == ((28, 28, 1), np.uint8, 255)

    fuzz("pictures", hostile.pictures(), use, 400, 20_000)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory, request) -> Path:
    """The folder of a complete run, of an ensemble where the test asks for one."""
    seeds = getattr(request, "param", None)
    where = {"data_dir": data_dir, "workdir": tmp_path_factory.mktemp("whole") / "run"}
    return fit(Config(model="logistic", dataset="digits", epochs=3, seeds=seeds, **where)).workdir


def set_digests_right(folder: Path) -> None:
    """As somebody does who wants a file to be believed."""

    def write(digests: Path, *paths: Path) -> None:
        small = [path for path in paths if path.is_file() and path.stat().st_size < 10**6]
        lines = storage.digest_lines({path.name: path.read_bytes() for path in small})
        hostile.cleared(digests).write_bytes(lines)

    for path in folder.glob("checkpoints/*.safetensors"):
        write(storage.digest_path(path), path)
    write(folder / runs.MANIFEST, *(folder / name for name in hostile.RECORDS[:-1]))


def assert_true(run: saved.LoadedRun, like: TrainState) -> None:
    """What was loaded is what stands in the newest file that no notice names."""
    assert jax.tree.map(np.shape, run.progress.state) == jax.tree.map(np.shape, like)
    path = checkpoint.CheckpointManager(run.folder / "checkpoints")._paths()[len(run.notices)]
    content = path.read_bytes()
    assert not path.is_symlink() and not path.parent.is_symlink()
    assert hashlib.sha256(content).hexdigest() in storage.digest_path(path).read_text()
    header, body = hostile.parts(content)
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
    layout = Layout.over(jax.devices()[:1], config.seeds)

    def resume(config: Config) -> None:
        with contextlib.closing(runs.Run(folder, config)) as run:
            keeper = Keeper(run, config, Stop(), key, layout, Team())
            keeper.restore(start, Metrics.zeros(config.seeds))

    readers = (
        lambda: assert_true(saved.load_run(folder), start),
        lambda: list(verify.verify(folder)),
        lambda: resume(saved.load_config(folder)),
        lambda: resume(config),  # writes the metrics of the checkpoint
        lambda: list(verify.verify(folder)),
    )

    def use(files_and_right):
        files, right = files_and_right
        shutil.copytree(whole, hostile.cleared(folder))
        # What is in a folder goes first: the folder may become a link.
        for place, content in sorted(files, key=lambda file: -len(Path(file[0]).parts)):
            path = hostile.cleared(folder / place)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                hostile.ODDITIES[content](path, whole / place)
        if right:
            set_digests_right(folder)
        for read in readers:
            with contextlib.suppress(MnistJaxError):
                read()

    files = st.lists(hostile.changes(what, whole), min_size=1, max_size=2)
    inputs = st.tuples(files, hostile.mostly(st.just(True), st.booleans()))
    fuzz(f"{what} of an ensemble" if config.seeds else what, inputs, use, 100, 1300)
    assert bytes_in(whole) == before  # where links lead


def test_command_lines(fuzz, monkeypatch):
    def no_runs(*folders, **_):
        raise UsageError("none of them holds a run")

    def no_network(*_, **__):
        raise OSError("there is none")

    split = SimpleNamespace(label=())
    dataset = SimpleNamespace(name="", source="", warnings=(), train=split, test=split)
    monkeypatch.setattr(mnist_jax, "fit", lambda config, **_: None)
    monkeypatch.setattr(verify, "verify", lambda folder, **_: ())
    monkeypatch.setattr(data, "load_dataset", lambda name, **_: dataset)
    monkeypatch.setattr(saved, "load_run", no_runs)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(saved, "load_runs", no_runs)
    monkeypatch.setattr(saved, "load_config", no_runs)

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

    training = st.tuples(st.just(train.main), hostile.lines(Config))
    others = [st.lists(hostile.VALUES, max_size=3)] + [
        st.builds(lambda name, words: [name, *words], st.just(name), hostile.lines(kind))
        for name, kind in COMMANDS.items()
    ]
    commands = st.tuples(st.just(__main__.main), st.one_of(others))
    fuzz("command lines", hostile.mostly(training, commands), use, 400, 5000)
