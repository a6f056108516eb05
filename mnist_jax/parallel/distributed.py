"""Several processes that train one network: what they agree on, with JAX's own distributed runtime.

All functions but `is_primary` and `leave` are collective: every process must call them, in the same
order. In a process that runs alone they return at once, without initializing a JAX backend.
"""

import collections
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnist_jax import errors
from mnist_jax.errors import (
    DeviceError,
    MnistJaxError,
    UsageError,
    first_line,
    is_out_of_memory,
)

INITIALIZATION_TIMEOUT_S = 120
HEARTBEAT_TIMEOUT_S = 30
PATIENCE_S = 10  # waiting for the others is reported after this time
# Set in every process by a launcher that starts several.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
# JAX reports a failed collective as a JaxRuntimeError or, from some calls, as a ValueError.
COLLECTIVE_ERRORS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination service")


def initialize(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> list[str]:
    """Connects this process to the others, before anything is computed.

    Does nothing without a coordinator, or where the caller has called `jax.distributed.initialize`.

    Args:
        coordinator: HOST:PORT of process 0; "auto" for what JAX detects; None to run alone.
        num_processes, process_id: with HOST:PORT only.

    Returns:
        Warnings.

    Raises:
        UsageError: nothing is detected, or a backend is in use already.
        DeviceError: the processes cannot connect, or have different numbers of devices. JAX itself
            aborts a process that waits for longer than `INITIALIZATION_TIMEOUT_S`.
    """
    if jax.distributed.is_initialized():
        return []
    if coordinator is None:
        return [
            f"this is one of {count} processes that {name} started and trains alone; "
            "--coordinator=auto makes them one run"
            for variable, name in LAUNCHERS.items()
            if (count := os.environ.get(variable, "1")) != "1"
        ]
    # JAX would replace the handler of SIGTERM by its own.
    jax.config.update("jax_enable_preemption_service", False)
    auto = coordinator == "auto"
    options: dict[str, Any] = {} if auto else {
        "coordinator_address": coordinator, "num_processes": num_processes,
        "process_id": process_id, "cluster_detection_method": "deactivate",
    }  # fmt: skip
    where = "" if auto else f" at {coordinator}"
    waiting = f"warning: waiting for the other processes{where} for {INITIALIZATION_TIMEOUT_S} s"
    timer = threading.Timer(PATIENCE_S, print, [waiting], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=INITIALIZATION_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
        devices = collections.Counter(device.process_index for device in jax.devices())
        if len(set(devices.values())) == 1:
            # Connects them: the first collective waits 30 s at most, later ones without a limit.
            multihost_utils.sync_global_devices("initialize")
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError(
            f"the processes cannot connect{where} ({first_line(error)}); check that the port is "
            "free, that process 0 runs there, and that each process has its own --process_id"
        ) from error
    except (RuntimeError, ValueError, KeyError, IndexError) as error:  # JAX's, for its arguments
        raise UsageError(
            f"JAX cannot start several processes ({first_line(error)}); start them with a launcher "
            "that JAX detects (Slurm, Open MPI 4, Kubernetes, a TPU pod), or give "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from error
    finally:
        timer.cancel()
    if len(set(devices.values())) > 1:
        raise DeviceError(
            f"the processes have {', '.join(map(str, devices.values()))} devices; all need the "
            "same number; choose them with JAX_LOCAL_DEVICE_IDS"
        )
    return []


def shutdown() -> None:
    """Disconnects the processes, once all have called this; for the owner of the process."""
    with process_errors():
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """Exits at once where `shutdown` was not called, as after an error; otherwise returns.

    Python's own exit would wait for processes that may never finish, and JAX then aborts it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(2)  # JAX aborts the others when process 0 ends: let them report their error
        os._exit(status)


@contextlib.contextmanager
def process_errors() -> Iterator[None]:
    """Makes a DeviceError of JAX's error for a collective that failed in this block."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        failed = any(word in str(error) for word in COLLECTIVE_ERRORS)
        if not failed or not jax.distributed.is_initialized() or is_out_of_memory(error):
            raise
        raise DeviceError(
            f"another process has probably ended ({first_line(error)}); its output says why; the "
            "same commands with the run's folder as --workdir resume from the last checkpoint"
        ) from error


def is_primary() -> bool:
    """Whether this is process 0, which writes the run's folder and shows the run."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """Process 0's value, in every process: anything that JSON can hold, of any size."""
    if not jax.distributed.is_initialized():
        return value
    text = _encode(value if is_primary() else None)
    with process_errors():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
        text = multihost_utils.broadcast_one_to_all(_pad(text[:size], size))
    return json.loads(bytes(text[:size]))


def broadcast_arrays(tree: Any) -> Any:
    """Process 0's NumPy arrays, bit for bit; elsewhere any of the same shapes and dtypes."""
    if not jax.distributed.is_initialized():
        return tree
    # As bytes: JAX broadcasts by adding zeros, which loses -0.0, and has no 64-bit types.
    as_bytes = jax.tree.map(lambda x: np.frombuffer(np.asarray(x).tobytes(), np.uint8), tree)
    with process_errors():
        found = multihost_utils.broadcast_one_to_all(as_bytes)
    return jax.tree.map(lambda x, b: np.asarray(b).view(x.dtype).reshape(x.shape), tree, found)


def on_primary(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0; its value, which JSON can hold, is that of every process.

    Raises:
        MnistJaxError: the error of `function`, in every process.
    """
    if not jax.distributed.is_initialized():
        return function()
    value, name, message = None, None, ""
    if is_primary():
        try:
            value = function()
        except MnistJaxError as error:
            name, message = type(error).__name__, str(error)
    value, name, message = broadcast((value, name, message))
    if name is not None:
        raise getattr(errors, name)(message)
    return value


def allgather(value: Any) -> list[Any]:
    """Every process's value, by index: anything that JSON can hold, of any size."""
    if not jax.distributed.is_initialized():
        return [value]
    text = _encode(value)
    with process_errors():
        sizes = multihost_utils.process_allgather(np.int32(text.size))
        texts = multihost_utils.process_allgather(_pad(text, max(sizes)))
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]


def any_signal(signal: int | None) -> int | None:
    """The signal of the first process that has one, in every process; one small collective."""
    if not jax.distributed.is_initialized():
        return signal
    with process_errors():
        signals = multihost_utils.process_allgather(np.int32(signal or 0))
    return next((int(number) for number in signals if number), None)


def check_same(facts: dict[str, Any]) -> None:
    """Refuses processes that would not compute the same: other flags, versions or data.

    Raises:
        UsageError: names what differs, in every process.
    """
    first, *others = allgather(facts)
    for index, facts in enumerate(others, 1):
        if different := [
            f"{name} ({facts.get(name)!r}, in process 0 {first.get(name)!r})"
            for name in {**first, **facts}
            if facts.get(name) != first.get(name)
        ]:
            raise UsageError(
                f"process {index} differs from process 0 in {', '.join(different)}; "
                "start all with the same flags, data and versions"
            )


def _encode(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _pad(text: np.ndarray, size: int) -> np.ndarray:
    """Filled up to a power of two, so that few shapes are compiled."""
    padded = np.zeros(1 << int(size).bit_length(), np.uint8)
    padded[: text.size] = text
    return padded
