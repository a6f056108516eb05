"""Devices: selection, meshes, and the same numbers on one device and on eight."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from shared import python

from mnist_jax.errors import UsageError
from mnist_jax.parallel import mesh

DEVICE = jax.devices("cpu")[0]


def on_eight_devices(*names: str) -> dict[str, Any]:
    # Skips LLVM's passes, not XLA's: programs compile faster.
    variables = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_NUM_CPU_DEVICES": "8"}
    return json.loads(python("tests/parallel/on_eight_devices.py", *names, **variables).stdout)


@pytest.fixture
def found_on_eight(once):
    return once("eight", lambda folder: on_eight_devices("mlp", "runs", "arrays"))


# In the collectives, each operation is the number of its floating-point operands: the gradients and
# the loss in one all-reduce, the counts in another one. On a CPU the gradient of a Winograd kernel
# is summed as six arrays.
CNN = pytest.param("cnn", 12 + 3 * 5 + 1, 1e-5, marks=pytest.mark.campaign)


@pytest.mark.parametrize(("name", "operands", "bound"), [("mlp", 4 + 1, 1e-9), CNN])
def test_eight_devices_compute_as_one_with_one_all_reduce(name, operands, bound, found_on_eight):
    found = found_on_eight[name] if name == "mlp" else on_eight_devices(name)[name]
    assert found["collectives"] == [{}, {"all-reduce": [0, operands]}]  # on one device, on eight
    assert 0 < found["difference"] < bound
    if name != "cnn":
        for on_one, on_eight in found["counts"]:  # of training, and of evaluation
            assert on_one == on_eight
            assert on_one[0] == 300


def test_a_run_gives_the_same_results_on_other_devices_and_when_it_moves(found_on_eight):
    found = found_on_eight["runs"]
    assert [run["devices"] for name in ("alone", "members") for run in found[name]] == [1, 8, 1, 4]
    for one, moved in found.values():
        np.testing.assert_allclose(moved["test_correct"], one["test_correct"], atol=2)  # of 360


def test_arrays_of_another_sharding_or_dtype_get_a_program_of_their_own(found_on_eight):
    replicated, split, bfloat16 = found_on_eight["arrays"]
    assert split == pytest.approx(replicated, rel=1e-5)
    assert bfloat16 == pytest.approx(replicated, rel=1e-3) and bfloat16 != replicated


def test_the_number_of_devices():
    for seeds, nearest in ((10, "train 8 or 16,"), (3, "train 8,")):
        with pytest.raises(UsageError, match=f"8 .* do not divide {seeds} .* {nearest}"):
            mesh.make_mesh([DEVICE] * 8, seeds)
    assert mesh.select_devices(DEVICE, "all") == jax.devices("cpu")
    assert mesh.select_devices(DEVICE, None) == [DEVICE]
