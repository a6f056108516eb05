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
    # JAX warns about proxies.
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env = inherited | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **pipes)


def start_all(count: int, *flags: Any, differing: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    numbers = f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"
    return [
        start("train.py", *flags, *numbers, f"--process_id={n}", *differing * (n == count - 1))
        for n in range(count)
    ]


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


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> dict:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return fit(dataclasses.replace(config, workdir=workdir)).record


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory) -> tuple[Path, list[Ended]]:
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, ends(start_all(2, *flags, f"--workdir={workdir}"))


AGREE = """
import dataclasses, os, sys, tempfile
import jax
import numpy as np
from mnist_jax import Config, cli, fit, load_dataset, save_run
from mnist_jax.errors import UsageError
from mnist_jax.parallel import distributed

index = int(sys.argv[1])

def agree():
    distributed.initialize("auto", None, None)
    distributed.initialize("auto", None, None)  # connects only once
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

    fit(config := cli.parse(Config, sys.argv[2:], prog="", description=""), callbacks=[])
    os.chdir(tempfile.mkdtemp())  # each finds another run
    base = Config(model="logistic", dataset="digits", data_dir=config.data_dir)
    kernel, data = np.full((784, 10), index, "f"), load_dataset("digits", data_dir=base.data_dir)
    save_run("base", base, data.spec, {"logits": {"kernel": kernel, "bias": kernel[0]}})
    try:
        fit(dataclasses.replace(base, init_from="base", coordinator="auto"), callbacks=[])
    except UsageError as error:
        print(error)
    distributed.on_primary(lambda: 1 / index)

distributed.leave(cli.exit_status(agree, debug=False))
"""


def test_processes_that_slurm_started_agree_and_train_until_one_fails(config, flags, tmp_path):
    """They train two networks, bit for bit those of one device: each is trained on one."""
    changes = {"model": "mlp", "hidden_sizes": (128,), "epochs": 1, "seeds": 2}  # not stacked
    alone = fit(dataclasses.replace(config, **changes, workdir=tmp_path / "alone")).record
    flags = *flags, "--model=mlp", "--hidden_sizes", "128", "--epochs=1", "--seeds=2"
    flags = *flags, f"--workdir={tmp_path / 'run'}"
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    processes = []
    for n in ("0", "1"):
        own = {"SLURM_NTASKS": "2", "SLURM_PROCID": n, "SLURM_LOCALID": n}
        processes.append(start("-c", AGREE, n, *flags, **slurm, **own))
    failed, waiting = ends(processes)
    assert "process 1 differs from process 0 in initial pa" in failed.stdout == waiting.stdout
    assert failed.returncode == 1 and "ZeroDivisionError" in one_error(failed)
    assert_lost(waiting)
    found = read_result(tmp_path / "run")
    assert len(found["devices"]) == 2
    assert found["params_sha256"] == alone["params_sha256"]


def test_auto_without_a_launcher_is_refused(flags):
    [ended] = ends([start("train.py", *flags, "--coordinator=auto")])
    assert ended.returncode == 2 and "auto needs Slurm, Open MPI 4" in one_error(ended)


def test_connecting_after_a_computation_or_through_a_port_in_use_is_refused():
    jax.devices()
    with pytest.raises(UsageError, match="JAX was used before the processes"):
        distributed.initialize("localhost:1", 2, 0)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(DeviceError, match=f"port {port} .*in use.* choose another port"):
            distributed.initialize(f"localhost:{port}", 2, 0)


def test_processes_with_other_flags_are_refused_by_all(flags, tmp_path):
    where = f"--workdir={tmp_path / 'run'}"
    for ended in ends(start_all(2, *flags, where, differing=("--seed=7", "--max_steps=5"))):
        assert ended.returncode == 2
        line = one_error(ended)
        assert "process 1 differs from process 0 in " in line and "seed (7, not 1234)" in line
        assert "max_steps (5, not None)" in line
    assert not (tmp_path / "run" / "config.json").exists()


def test_two_processes_reach_the_accuracy_of_one(two, alone):
    workdir, (first, second) = two
    assert (first.returncode, second.returncode) == (0, 0), two
    # Sums in another order round otherwise; of 360 images that turns none.
    found = read_result(workdir)
    assert (found["test_correct"], found["test_count"]) == (alone["test_correct"], 360)
    assert alone["test_accuracy"] > 0.8
    assert len(found["devices"]) == 2
    # Only process 0 prints and writes.
    assert first.stdout.count("\n") >= FIELDS["epochs"] and "test accuracy" in first.stdout
    assert (second.stdout, first.stderr, second.stderr) == ("", "", "")
    assert {path.name for path in workdir.parent.iterdir()} == {"run"}


def test_a_signal_to_one_process_ends_all_and_the_run_resumes(alone, flags, config, tmp_path):
    """Here in one process; the test of a lost process resumes in two."""
    workdir = tmp_path / "run"
    processes = start_all(2, *flags, f"--workdir={workdir}")
    wait_for_epochs(workdir, 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    ended = ends(processes)
    assert [each.returncode for each in ended] == [128 + signal.SIGTERM] * 2, ended
    assert all("run the same command with --workdir=" in each.stderr for each in ended)
    assert not (workdir / "result.json").exists()
    resumed = fit(dataclasses.replace(config, workdir=workdir)).record
    assert (resumed["test_correct"], len(resumed["devices"])) == (alone["test_correct"], 1)


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_the_run_resumes(number, victim, two, flags, tmp_path):
    workdir = tmp_path / "run"
    processes = start_all(2, *flags, f"--workdir={workdir}")
    wait_for_epochs(workdir, 2, processes[0])
    processes[victim].send_signal(number)
    [other] = ends([processes[1 - victim]], within_s=60)
    processes[victim].kill()
    ends([processes[victim]])
    assert_lost(other)
    again = ends(start_all(2, *flags, f"--workdir={workdir}"))
    assert [each.returncode for each in again] == [0, 0], again
    assert read_result(workdir)["params_sha256"] == read_result(two[0])["params_sha256"]
