"""Runs over many devices: the same numbers, one sum of the gradients, and nothing else sent."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mnist_jax import cli
from mnist_jax.errors import DeviceError
from mnist_jax.parallel.mesh import Layout, select_devices

ROOT = Path(__file__).parent.parent


def on_devices(_: Path) -> dict[str, Any]:
    where = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "tests/on_devices.py"]
    done = subprocess.run(script, cwd=ROOT, env=where, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def found(once) -> dict[str, Any]:
    """What tests/on_devices.py found on eight devices of a CPU."""
    return once("on_devices", on_devices)


def test_one_all_reduce_holds_all_gradients_and_nothing_else_is_sent(found):
    # The operands that are float32: of the one the gradients and the loss, of the other, which
    # counts examples, none. On a CPU a Winograd kernel's gradient is summed as six rows.
    assert found["collectives"]["logistic"] == {"all-reduce": [0, 2 + 1]}
    assert found["collectives"]["mlp"] == {"all-reduce": [0, 4 + 1]}
    assert found["collectives"]["cnn"] == {"all-reduce": [0, 12 + 3 * 5 + 1]}


def test_the_first_gradients_are_those_of_one_device(found):
    assert set(found["gradients"]) == {"logistic", "mlp", "cnn"}  # with dropout and distortions
    for name, apart in found["gradients"].items():
        assert 0 < apart < 1e-5, name


def test_fifty_float64_steps_end_where_those_of_one_device_do(found):
    for name, apart in found["steps"].items():
        assert len(apart) == 3 and 0 < max(apart) < 1e-9, name


def test_every_example_counts_once_however_many_devices(found):
    for sums, tests in found["counts"].values():
        assert sums == [sums[0]] * 4 and tests == [tests[0]] * 4
        assert tests[0][0] == 300


def test_microbatches_give_the_same_bits_on_any_number_of_devices(found):
    assert found["in microbatches"] == [[True] * 3, [True] * 3, [True]]
    # Among four devices two exchanges of kernel, bias and loss; what is counted may pass apart.
    assert found["exchanges"]["collective-permute"].count(1) == 2 * 3


def test_one_device_runs_the_plain_program(found):
    assert found["plain"] == [True] * 3


def test_a_run_gives_the_same_accuracy_on_many_devices_and_when_it_moves(found):
    one, *others = found["runs"]["alone"]
    for other in others:
        assert abs(other["test_correct"] - one["test_correct"]) <= 1e-3 * one["test_count"]
    assert [len(record["devices"]) for record in (one, *others)] == [1, 8, 1, 8]


def test_members_spread_over_devices_are_those_of_one_device(found):
    one, *others = found["runs"]["members"]
    assert [len(record["devices"]) for record in others] == [6, 1, 6]
    for other in others:
        assert len(other["test_correct"]) == 11
        np.testing.assert_allclose(other["test_correct"], one["test_correct"], atol=1)
    one, moved = found["runs"]["in turn"]
    assert len(moved["devices"]) == 3
    assert moved["params_sha256"] == one["params_sha256"]


@pytest.mark.parametrize(
    ("members", "devices", "used"), [(10, 8, 5), (11, 8, 6), (3, 8, 3), (16, 8, 8), (1, 8, 1)]
)
def test_members_take_no_more_devices_than_shorten_the_run(members, devices, used):
    layout = Layout.over([jax.devices()[0]] * devices, members)
    assert len(layout.devices) == used
    assert layout.per_device == -(-members // devices)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(DeviceError, match=r"devices is 9; JAX finds \d+ cpu devices?; JAX_NUM_CPU"):
        select_devices(jax.devices()[0], 9)


def test_all_devices_are_all_there_are():
    assert select_devices(jax.devices()[0], "all") == jax.devices()
    assert select_devices(jax.devices()[0], None) == jax.devices()[:1]


@pytest.mark.parametrize("word", ["0", "-1", "many", "1.5"])
def test_a_number_of_devices_that_cannot_be_is_a_usage_error(word, capsys):
    import train

    assert train.main([f"--devices={word}"]) == 2
    assert "devices" in capsys.readouterr().err


def test_the_flag_reaches_the_config():
    parsed = [
        cli.parse_config(argv, prog="", description="").devices
        for argv in ([], ["--devices=all"], ["--devices", "8"])
    ]
    assert parsed == [None, "all", 8]
