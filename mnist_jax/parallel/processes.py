"""Several processes as one run: how they find each other, and notice that one is lost.

JAX's distributed runtime moves the arrays. What is here goes through its coordinator, which listens
on process 0's machine and keeps a few short texts that all can read: each process's sign of life,
and how it ended. What they agree on while they run is in `mnist_jax/parallel/team.py`.
"""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import jax
from jax._src import clusters, distributed  # neither's parts used here have public names

from mnist_jax.config import Config, is_address
from mnist_jax.errors import DeviceError, UsageError, ending, first_line, is_out_of_memory
from mnist_jax.parallel import coordinator
from mnist_jax.parallel.team import key_of

WAITING_S = 30  # until a process says that it waits for others
JOIN_S = 120  # until all processes must have been started
LOST_S = 20.0  # without a sign of life until a process is given up
PULSE_S = 1.0
FAREWELL_S = 5.0  # that a process which ends waits for the others to hear why
GO_ON = "the same commands with the run's folder as --workdir go on from its last checkpoint"
# What launchers set in each of the processes they start, with the name to call them by.
LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}


def not_joined() -> list[str]:
    """Notices: a launcher started several processes, and each is about to train alone."""
    return [
        f"this is one of {count} processes that {name} started, and trains alone; "
        "--coordinator=auto makes them one run"
        for variable, name in LAUNCHERS.items()
        if (count := os.environ.get(variable, "1")) != "1" and not jax.distributed.is_initialized()
    ]


def join(config: Config) -> "Watch | None":
    """Joins the other processes of the run, if the config names any; before anything is computed.

    For the process's owner, who ends with `leave`.

    Raises:
        DeviceError: not all came within `JOIN_S` seconds, two claim one number, or their
            coordinator cannot be reached.
        UsageError: no launcher is found that says who they are, or they were told different numbers
            of processes.
    """
    if config.coordinator is None:
        return None
    address, count, index, devices = (
        launched()
        if config.coordinator == "auto"
        else (config.coordinator, config.num_processes, config.process_id, named_devices())
    )
    assert count is not None and index is not None, "Config demands them"
    host, _, port = address.rpartition(":")
    line = f"notice: process {index} of {count} is waiting for the others at {address}\n"
    waiting = threading.Timer(WAITING_S, os.write, (2, line.encode()))
    waiting.daemon = True
    waiting.start()
    try:
        own = Coordinator(int(port), count) if index == 0 else None
        answer = coordinator.answer_roll(host.strip("[]"), int(port), index, count, JOIN_S)
    finally:
        waiting.cancel()
    if answer.problem:
        why = f"process {index} of {count} cannot join the others at {address}: {answer.problem}"
        if answer.differs:
            raise UsageError(f"{why}; start all with the same number")
        raise DeviceError(
            f"{why}; check that all are started, each with a number of its own, and that process 0 "
            "runs there"
        )
    jaxlib: Any = distributed._jax  # pyright: ignore[reportPrivateImportUsage]
    # CPUs find each other by what a machine's own name stands for, which often is 127.0.0.1.
    gloo = "make_gloo_tcp_collectives"
    setattr(jaxlib, gloo, functools.partial(getattr(jaxlib, gloo), hostname=answer.address))
    service = "get_distributed_runtime_service"
    try:
        with mock.patch.object(jaxlib, service, own and own.serve):
            jax.distributed.initialize(
                address,
                count,
                index,
                local_device_ids=devices,
                cluster_detection_method="deactivate",
                initialization_timeout=JOIN_S,
                # Later than `Watch`, which can say what happened.
                heartbeat_timeout_seconds=round(3 * LOST_S),
                shutdown_timeout_seconds=round(LOST_S),
            )
    except jax.errors.JaxRuntimeError as error:
        raise DeviceError(
            f"process {index} of {count} cannot join the others at {address}: "
            f"{first_line(error)}; start all again"
        ) from error
    return Watch(distributed.global_state.client, index, count) if count > 1 else None


def launched() -> tuple[str, int, int, list[int] | None]:
    """What JAX finds that a launcher says: address, count, number, and this process's devices.

    Raises:
        UsageError: it finds none.
    """
    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    address = count = index = devices = None
    why = ""
    try:
        address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            given, None, None, None, None, JOIN_S
        )
    except (RuntimeError, ValueError, KeyError) as error:
        why = f" ({first_line(error)})"
    if address is None or count is None or index is None:
        if os.environ.get("OMPI_COMM_WORLD_SIZE"):
            raise UsageError(
                "Open MPI from version 5 on does not say where process 0 is; give each process "
                "--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE "
                "--process_id=$OMPI_COMM_WORLD_RANK"
            )
        raise UsageError(
            f"no launcher says which processes belong to the run{why}; start it with srun or "
            "mpirun, in Kubernetes or on a TPU pod, or give --coordinator=HOST:PORT, "
            "--num_processes and --process_id"
        )
    if not is_address(address):
        raise UsageError(
            f"the coordinator's address is {address!r}; allowed is HOST:PORT; change "
            "JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
        )
    return address, count, index, named_devices() or (None if devices is None else list(devices))


def named_devices() -> list[int] | None:
    """This process's devices by JAX_LOCAL_DEVICE_IDS; None where that is not set.

    Raises:
        UsageError: it names none.
    """
    if not (text := os.environ.get("JAX_LOCAL_DEVICE_IDS")):
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"JAX_LOCAL_DEVICE_IDS is {text!r}; allowed are whole numbers with commas between them"
        ) from error


class Coordinator:
    """Process 0's hand on the process of `mnist_jax/parallel/coordinator.py`, which it starts.

    Raises:
        DeviceError: the port is taken.
    """

    def __init__(self, port: int, count: int):
        pipe = subprocess.PIPE
        # Ctrl-C is meant for the run, and is not to reach that process.
        self._process = subprocess.Popen(
            [sys.executable, "-P", coordinator.__file__],  # not: what lies beside it
            stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self._ask([port, count, JOIN_S, LOST_S + FAREWELL_S])

    def serve(self, *arguments: Any, **options: Any) -> "Coordinator":
        """In place of the function of jaxlib that takes these arguments."""
        self._ask([arguments, options])
        return self

    def shutdown(self) -> None:
        """Ends the service."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate('"shut down"\n', timeout=FAREWELL_S)

    def _ask(self, what: Any) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            problem = json.loads(self._process.stdout.readline() or '"it ended"')
        except OSError as error:
            problem = str(error)
        if problem:
            raise DeviceError(
                f"process 0 has no coordinator: {problem}; start one process 0 only, or give all "
                "processes another port in --coordinator (with auto, in JAX_COORDINATOR_PORT)"
            )


class Watch:
    """Ends this process, with a line and status 6, when another is lost; JAX alone might wait.

    A process is lost when it gave no sign of life for `LOST_S` seconds; so is its coordinator's
    when nothing was heard from that for as long. One that ended with an error takes the others
    with it, with its status.
    """

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        now = time.monotonic()
        self._answered = now  # when the coordinator last did
        self._signs = dict.fromkeys(map(str, range(count)), ("", now))  # the last, and when it came
        self._ends: dict[str, tuple[int, str]] = {}  # how others ended
        self._over = threading.Event()
        for task in (self._pulse, self._judge):
            threading.Thread(target=task, daemon=True).start()

    def _pulse(self) -> None:
        """Gives signs of life and looks for those of others."""
        number = 0
        while not self._over.wait(PULSE_S):
            number += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._client.key_value_set(key_of("alive", self._index), str(number), True)
                signs, ends = (
                    {key.rpartition("/")[2]: text for key, text in found}
                    for found in map(
                        self._client.key_value_dir_get, (key_of("alive"), key_of("ended"))
                    )
                )
                self._answered = now = time.monotonic()
                for index, sign in signs.items():
                    if self._signs[index][0] != sign:
                        self._signs[index] = sign, now
                self._ends = {index: tuple(json.loads(text)) for index, text in ends.items()}

    def _judge(self) -> None:
        """In a thread of its own, as a call to a coordinator out of reach may not return."""
        heard_at: float | None = None  # when an error elsewhere was first seen
        while not self._over.wait(PULSE_S):
            now = time.monotonic()
            failed = {
                index: end
                for index, end in self._ends.items()
                if _is_error(end[0]) and index != str(self._index)
            }
            if failed:
                heard_at = heard_at or now
                # This process may be about to say the same of itself.
                if now - heard_at > FAREWELL_S / 2:
                    index, (status, text) = next(iter(failed.items()))
                    _end(status, f"process {index} of {self._count} ended: {text}")
            elif now - self._answered > LOST_S:
                self._lost("process 0, the coordinator,")
            for index, (_, at) in self._signs.items():
                silent = self._answered - at > LOST_S and index not in self._ends
                if silent and index != str(self._index):
                    self._lost(f"process {index}")

    def _lost(self, who: str) -> NoReturn:
        _end(
            DeviceError.exit_status,
            f"{who} of {self._count} processes is gone or cannot be reached; {GO_ON}",
        )

    def end(self, status: int, line: str) -> None:
        """Says how this process ended, and waits until the others have or know.

        Without an error that is as long as process 0 still writes: who left JAX's service before
        would have it end them all. Meanwhile the threads above see to it that all are alive.
        """
        text = line.removeprefix("error: ") or "whoever read its output has gone"
        told = json.dumps([status, text])
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(key_of("ended", self._index), told, True)
        until = time.monotonic() + FAREWELL_S if _is_error(status) else math.inf
        while len(self._ends) < self._count and time.monotonic() < until:
            time.sleep(PULSE_S / 10)
        self._over.set()


def _is_error(status: int) -> bool:
    """Whether a status is one that the other processes do not come to by themselves."""
    return status not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def _end(status: int, text: str) -> NoReturn:
    """At once: the main thread may be inside a call that never returns."""
    sys.stdout.flush()
    os.write(2, f"error: {text}\n".encode())
    os._exit(status)


@contextlib.contextmanager
def joined(config: Config) -> Iterator[None]:
    """`join`, and at the end the others are told how this process ended.

    Raises:
        DeviceError: in place of an error of JAX, where no process was found lost.
    """
    watch = join(config)
    if watch is None:
        yield
        return
    try:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Most likely another process is gone, which the watch is about to find out.
            time.sleep(LOST_S + FAREWELL_S)
            text = f"the processes cannot work together ({first_line(error)}); {GO_ON}"
            raise DeviceError(text) from error
    except BaseException as error:
        watch.end(*ending(error))
        raise
    watch.end(0, "")


def leave(status: int) -> None:
    """Ends a process that had joined others; returns where it was alone.

    Its interpreter's own end would wait for processes that are no more.
    """
    if distributed.global_state.client is None:
        return
    if not _is_error(status):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
