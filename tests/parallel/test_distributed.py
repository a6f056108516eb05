"""Several processes that train one network: the numbers of one process, and a clear end."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from shared import ROOT

from mnist_jax import Config, fit
from mnist_jax.errors import DeviceError, UsageError
from mnist_jax.parallel import distributed
from mnist_jax.runs.run_dir import read_result

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Gloo")

Ended = subprocess.CompletedProcess
# 1,437 training images: neither batches of 75 nor the rest divide into two parts.
FIELDS: dict[str, Any] = {"model": "logistic", "dataset": "digits", "batch_size": 75, "epochs": 6}
FIELDS |= {"learning_rate": 0.005, "steps_per_call": 5}


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(*command: Any, **variables: str) -> subprocess.Popen:
    """Starts Python with these arguments, from the checkout."""
    # JAX warns about proxies.
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env = inherited | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **pipes)


def start_two(*command: Any) -> list[subprocess.Popen]:
    """Starts this command in two processes, with the flags that connect them."""
    connect = *command, f"--coordinator=localhost:{free_port()}", "--num_processes=2"
    return [start(*connect, f"--process_id={n}") for n in range(2)]


def ends(processes: list[subprocess.Popen], *, within_s: float = 300) -> list[Ended]:
    """How they ended; those that did not in time are killed, and the test fails."""
    until = time.monotonic() + within_s
    try:
        found = []
        for process in processes:
            out, err = process.communicate(timeout=max(0.0, until - time.monotonic()))
            lines = [line for line in out.splitlines(True) if not line.startswith("[Gloo]")]
            found.append(Ended(process.args, process.returncode, "".join(lines), err))
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def one_error(ended: Ended) -> str:
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: "), ended
    return ended.stderr


def assert_lost(ended: Ended) -> None:
    """It ended because another did: by our error, or aborted by JAX if that is faster."""
    assert ended.returncode in (6, -signal.SIGABRT), ended
    assert re.search("another (process has probably ended|task died)", ended.stderr), ended


def wait_for_epochs(workdir: Path, epochs: int, process: subprocess.Popen) -> None:
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < epochs:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def flags(data_dir):
    return [f"--{name}={value}" for name, value in {**FIELDS, "data_dir": data_dir}.items()]


@pytest.fixture(scope="module")
def config(data_dir) -> Config:
    return Config(**FIELDS, data_dir=data_dir)


# `train.py` twice in each process, which stays connected after the first end: by a signal.
TWICE = """
import shutil, sys
from mnist_jax.parallel import distributed
import train

workdir, *flags = sys.argv[1:]
leave, distributed.leave = distributed.leave, lambda status: None
assert train.main(flags) == 143
if distributed.is_primary():
    shutil.copytree(workdir, f"{workdir}-copy")
distributed.leave = leave
sys.exit(train.main(flags))
"""


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory) -> tuple[Path, list[Ended]]:
    """The folder of a run in two processes, a signal to one of them within, and how they ended."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    processes = start_two("-c", TWICE, workdir, *flags, f"--workdir={workdir}")
    wait_for_epochs(workdir, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    return workdir, ends(processes)


AGREE = """
import os, sys
import jax
import numpy as np
from mnist_jax import Config, cli, fit
from mnist_jax.errors import UsageError
from mnist_jax.parallel import distributed

_, index, folder, *flags = sys.argv
index = int(index)

def train(*more):
    words = [*flags, f"--workdir={folder}", *more]
    fit(cli.parse(Config, words, prog="", description=""), callbacks=[])

def refused(function, *args):
    try:
        function(*args)
    except UsageError as error:
        print(error)

def agree():
    slurm = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith("SLURM_")}
    refused(distributed.initialize, "auto", None, None)  # without a launcher
    os.environ.update(slurm)
    assert distributed.initialize("auto", None, None) == []
    assert distributed.initialize("auto", None, None) == []  # only once
    assert jax.process_count() == 2 and distributed.is_primary() == (index == 0)

    large = {"text": "é" * 100_000, "list": [1, None, 2.5]}
    assert distributed.broadcast(large if index == 0 else "ignored") == large
    assert distributed.allgather(["x" * index * 1000]) == [[""], ["x" * 1000]]
    assert distributed.on_primary(lambda: index) == 0

    arrays = {"floats": np.array([-0.0, np.nan, 1e-42], np.float32), "wide": np.arange(3) + 2**40}
    arrays |= {"scalar": np.array(True), "empty": np.zeros((0, 3))}
    sent = arrays if index == 0 else jax.tree.map(np.zeros_like, arrays)
    for name, array in distributed.broadcast_arrays(sent).items():
        assert (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape)
        assert array.tobytes() == arrays[name].tobytes()

    assert distributed.any_signal(None) is None
    assert distributed.any_signal(15 if index == 1 else None) == 15
    distributed.check_same({"seed": 1})
    refused(train, *["--seed=7", "--max_steps=5"] * index)
    assert not os.path.exists(folder)
    train()
    distributed.on_primary(lambda: 1 / index)

distributed.leave(cli.exit_status(agree, debug=False))
"""


def test_processes_that_slurm_started_agree_and_train_until_one_fails(config, flags, tmp_path):
    """They train two networks, bit for bit those of one device: each is trained on one."""
    changes = {"model": "mlp", "hidden_sizes": (128,), "epochs": 1, "seeds": 2}  # not stacked
    alone = fit(dataclasses.replace(config, **changes, workdir=tmp_path / "alone")).record
    flags = *flags, "--model=mlp", "--hidden_sizes", "128", "--epochs=1", "--seeds=2"
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    processes = []
    for n in ("0", "1"):
        own = {"SLURM_NTASKS": "2", "SLURM_PROCID": n, "SLURM_LOCALID": n}
        processes.append(start("-c", AGREE, n, tmp_path / "run", *flags, **slurm, **own))
    failed, waiting = ends(processes)
    alone_refused, other_flags_refused = failed.stdout.splitlines()
    assert waiting.stdout == failed.stdout
    assert "auto needs Slurm, Open MPI 4" in alone_refused
    differs = "process 1 differs from process 0 in seed (7, not 1234), max_steps (5, not None); "
    assert other_flags_refused.startswith(f"{differs}start all with the same flags")
    assert failed.returncode == 1 and "ZeroDivisionError" in one_error(failed)
    assert_lost(waiting)
    found = read_result(tmp_path / "run")
    assert len(found["devices"]) == 2
    assert found["params_sha256"] == alone["params_sha256"]


@pytest.mark.parametrize(("variable", "name"), distributed.LAUNCHERS.items())
def test_a_launched_process_that_trains_alone_warns(variable, name, monkeypatch):
    for other in distributed.LAUNCHERS:
        monkeypatch.delenv(other, raising=False)
    assert distributed.initialize(None, None, None) == []
    monkeypatch.setenv(variable, "4")
    [warning] = distributed.initialize(None, None, None)
    assert f"one of 4 processes that {name} started" in warning and "--coordinator=auto" in warning


def test_connecting_after_a_computation_or_through_a_port_in_use_is_refused():
    jax.devices()
    with pytest.raises(UsageError, match="must be called before any JAX calls"):
        distributed.initialize("localhost:1", 2, 0)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DeviceError, match=f"port {port} .*in use.* choose another port"):
            distributed.initialize(f"localhost:{port}", 2, 0)


def test_a_signal_to_one_process_ends_both_and_the_run_reaches_the_accuracy_of_one(
    two, config, tmp_path
):
    """Whether it resumes in both, or in one process."""
    workdir, (first, second) = two
    assert (first.returncode, second.returncode) == (0, 0), two
    folders = tmp_path / "alone", workdir.with_name("run-copy")
    alone, one = (fit(dataclasses.replace(config, workdir=folder)).record for folder in folders)
    found = read_result(workdir)
    # Sums in another order round otherwise; of 360 images that turns none.
    assert one["test_correct"] == found["test_correct"] == alone["test_correct"] > 0.8 * 360
    assert [len(record["devices"]) for record in (one, found)] == [1, 2]
    # Only process 0 prints and writes.
    assert first.stdout.count("\n") >= FIELDS["epochs"] and "test accuracy" in first.stdout
    assert second.stdout == ""
    for ended in two[1]:
        line = r"interrupted at step \d+; to resume, run the same command with --workdir=.*\n"
        assert re.fullmatch(line, ended.stderr), ended
    assert {path.name for path in workdir.parent.iterdir()} == {"run", "run-copy"}


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_the_run_resumes(number, victim, two, flags, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two("train.py", *flags, f"--workdir={workdir}")
    wait_for_epochs(workdir, 2, processes[0])
    processes[victim].send_signal(number)
    [other] = ends([processes[1 - victim]], within_s=60)
    processes[victim].kill()
    ends([processes[victim]])
    assert_lost(other)

    again = ends(start_two("train.py", *flags, f"--workdir={workdir}"))
    assert [each.returncode for each in again] == [0, 0], again
    assert read_result(workdir)["params_sha256"] == read_result(two[0])["params_sha256"]
