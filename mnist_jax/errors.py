"""Errors a user can act on. Each class knows the status its command exits with.

A message is one line: what was found; what is allowed; what to do. Whatever is not an
`MnistJaxError` is a bug and exits with 1.
"""

import difflib
import errno
import signal
from collections.abc import Iterable

import jax


class MnistJaxError(Exception):
    """Base of all errors below."""

    exit_status = 1


class UsageError(MnistJaxError):
    """A flag or a configuration that cannot be run."""

    exit_status = 2


class DataError(MnistJaxError):
    """A data set or an input file that is missing, damaged or not what it claims to be."""

    exit_status = 3


class CheckpointError(MnistJaxError):
    """A checkpoint, or another file that a run left, that cannot be used."""

    exit_status = 4


class NonFiniteError(MnistJaxError):
    """The loss or a gradient became NaN or infinite."""

    exit_status = 5


class DeviceError(MnistJaxError):
    """A device that is absent, or memory or disk that ran out."""

    exit_status = 6


class WorseError(MnistJaxError):
    """A comparison found the second slower or worse."""

    exit_status = 7


class InterruptedRunError(MnistJaxError):
    """A signal ended the run, which can be continued.

    Args:
        message: where it stands.
        signal: the signal's number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_status = 128 + signal


def unknown_choice(what: str, got: object, choices: Iterable[str]) -> UsageError:
    """The error for a name outside `choices`, with the nearest name that exists."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(got).lower(), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UsageError(f"unknown {what} {got!r}; choose from {', '.join(choices)}{hint}")


def ending(error: BaseException) -> tuple[int, str]:
    """The status that a command exits with after an error, and the line that it says of it.

    No line where whoever read the output has gone: the command stops, as others do.
    """
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, InterruptedRunError):
        return error.exit_status, str(error)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, MnistJaxError):
        return error.exit_status, f"error: {error}"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        line = f"error: out of memory ({first_line(error)}); train with a smaller --batch_size"
        return DeviceError.exit_status, line
    if is_process_failure(error):
        return DeviceError.exit_status, (
            f"error: another process has probably ended ({first_line(error)}); its output says "
            "why; the same commands with the run's folder as --workdir resume the run"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return DeviceError.exit_status, f"error: {error}; free some space on the disk"
    if isinstance(error, ModuleNotFoundError):
        return 1, f"error: {error}; install what is needed with: pip install ."
    return 1, (
        f"error: {type(error).__name__}: {first_line(error)}; this is a bug in mnist_jax; "
        "--debug shows where"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA could not have the memory that it needed."""
    said = ("RESOURCE_EXHAUSTED", "Out of memory")  # by XLA, as it is compiled for each platform
    return isinstance(error, jax.errors.JaxRuntimeError) and any(map(str(error).__contains__, said))


def is_process_failure(error: BaseException) -> bool:
    """Whether a collective failed: JAX's error is a JaxRuntimeError or, on a CPU, a ValueError."""
    words = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination service")
    return (
        jax.distributed.is_initialized()
        and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        and any(word in str(error) for word in words)
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [""])[0]


def printable(text: str) -> str:
    """The text in one line, with nothing that a terminal obeys, whatever is in a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
