"""Several processes that train one network: what they agree on, with JAX's distributed runtime.

Every process must call these functions, all but `is_primary` and `leave`, in the same order. In a
process that runs alone they return at once, without starting a JAX backend.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mnist_jax import errors
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError, first_line
from mnist_jax.parallel.mesh import select_device

CONNECT_S, HEARTBEAT_S = 120, 30  # JAX aborts a process that waits longer for another


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others, before anything is computed.

    Does nothing if `jax.distributed.initialize` was called before.

    Args:
        coordinator: HOST:PORT of process 0; "auto" for what JAX detects; None to run alone.
        num_processes, process_id: with HOST:PORT only.

    Raises:
        UsageError: JAX detects no launcher, or a JAX backend is in use already.
        DeviceError: the port is taken. JAX itself aborts a process that waits too long.
    """
    if coordinator is None or jax.distributed.is_initialized():
        return
    if process_id == 0:  # JAX crashes (0.10 to 0.12) where the port is taken
        port = int(coordinator.rpartition(":")[2])
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            raise DeviceError(
                f"process 0 cannot listen on port {port} ({error.strerror}); choose another port"
            ) from error
    # JAX would replace the SIGTERM handler with its own.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method=address and "deactivate",
            initialization_timeout=CONNECT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
        select_device("auto")  # a clear error where there is none
        # Gloo connects in the first collective, for which it waits 30 s; later ones wait longer.
        multihost_utils.sync_global_devices("initialize")
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        if "before any JAX" in str(error):
            problem = "JAX was used before the processes connect, by this program or by the fork"
            raise UsageError(f"{problem}; make arrays inside functions") from error
        kind = DeviceError if isinstance(error, jax.errors.JaxRuntimeError) else UsageError
        raise kind(
            f"the processes cannot connect ({first_line(error)}); start process 0 at the address "
            "of --coordinator, and all with the same number of devices and with --process_id of "
            "their own; auto needs Slurm, Open MPI 4 (5 with jax 0.12 and mpi4py), Kubernetes or "
            "a TPU pod"
        ) from error


def leave(status: int) -> None:
    """Exits at once if the processes are still connected, as after an error.

    Python's own exit would wait for processes that may not end, and JAX then aborts this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        with contextlib.suppress(RuntimeError, AssertionError):  # JAX found no device
            # JAX aborts the others when process 0 ends: first let them report their own error.
            time.sleep(2 * is_primary())
        os._exit(status)


def is_primary() -> bool:
    """Whether this is process 0, which writes the run's folder and shows the run."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def allgather(value: Any) -> list[Any]:
    """Every process's value, by index: anything that JSON can hold, of any size."""
    if not jax.distributed.is_initialized():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(1 << int(max(sizes)).bit_length(), np.uint8)  # few shapes to compile
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Process 0's value, in every process: anything that JSON can hold, of any size."""
    return allgather(value if is_primary() else None)[0]


def on_primary(function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0; its value, which JSON can hold, is that of every process.

    Raises MnistJaxError: the error of `function`, in every process.
    """
    value, failure = None, None
    if is_primary():
        try:
            value = function()
        except MnistJaxError as error:
            if not jax.distributed.is_initialized():
                raise
            failure = type(error).__name__, str(error)
    value, failure = broadcast((value, failure))
    if failure:
        raise getattr(errors, failure[0])(failure[1])
    return value


def broadcast_arrays(tree: Any) -> Any:
    """Process 0's NumPy arrays, bit for bit; elsewhere any of the same shapes and dtypes."""
    if not jax.distributed.is_initialized():
        return tree
    # As bytes: JAX broadcasts by adding zeros, which loses -0.0, and drops half of 64 bits.
    as_bytes = jax.tree.map(lambda x: np.frombuffer(np.asarray(x).tobytes(), np.uint8), tree)
    found = multihost_utils.broadcast_one_to_all(as_bytes)
    return jax.tree.map(lambda x, b: np.asarray(b).view(x.dtype).reshape(x.shape), tree, found)


def check_same(facts: dict[str, Any]) -> None:
    """Raises UsageError in every process, naming what differs, if the processes' facts differ."""
    first, *others = allgather(facts)
    for index, own in enumerate(others, 1):
        names = [name for name in {**first, **own} if own.get(name) != first.get(name)]
        if names:
            found = (f"{name} ({own.get(name)!r}, not {first.get(name)!r})" for name in names)
            raise UsageError(
                f"process {index} differs from process 0 in {', '.join(found)}; "
                "start all with the same flags, data and versions"
            )
