"""Errors that a user can act on, each with the exit status of a command.

A message is one line: what was found; what is allowed; what to do. Any other exception is a bug.
"""

import contextlib
import difflib
import errno
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax


class MnistJaxError(Exception):
    """Base of all errors below."""

    exit_status = 1


class UsageError(MnistJaxError):
    """A flag or a config that is not allowed."""

    exit_status = 2


class DataError(MnistJaxError):
    """A data set or an input file is missing or damaged."""

    exit_status = 3


class CheckpointError(MnistJaxError):
    """A checkpoint, or another file of a run, cannot be used."""

    exit_status = 4


class NonFiniteError(MnistJaxError):
    """The loss or a gradient became NaN or infinite."""

    exit_status = 5


class DeviceError(MnistJaxError):
    """A device is absent, or memory or disk space ran out."""

    exit_status = 6


class WorseError(MnistJaxError):
    """A comparison found the second run slower or worse."""

    exit_status = 7


class InterruptedRunError(KeyboardInterrupt):
    """A signal, by its number, ended the run, which can be resumed.

    As Python's own interrupt it is no Exception: a loop that catches errors ends, too.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)  # both, to be pickled
        self.exit_status = 128 + signal

    def __str__(self) -> str:
        return self.args[0]

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: one line, because nothing went wrong."""
        return [str(self)]


def unknown_choice(what: str, got: object, choices: Iterable[str]) -> UsageError:
    """The error for a name outside `choices`; it suggests the nearest one."""
    choices = sorted(choices)
    near = difflib.get_close_matches(str(got).lower(), choices, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    listed = ", ".join(choices) or "those that --fork adds"
    return UsageError(f"unknown {what} {got!r}; choose from {listed}{hint}")


@contextlib.contextmanager
def writing(what: object, flag: str) -> Iterator[None]:
    """Turns an OSError inside into a DeviceError: choose another `flag` to write `what`."""
    try:
        yield
    except OSError as error:
        full = "free some space or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        problem = f"cannot write {what} ({error.strerror or error})"
        raise DeviceError(f"{problem}; {full}choose another {flag}") from error


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """Turns any error of the user's own code, which runs inside, into a UsageError."""
    try:
        yield
    except (MnistJaxError, MemoryError):
        raise
    except Exception as error:
        where, problem = place_in_fork(error), f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{what} fails{where}: {problem}; --debug shows where") from error


def place_in_fork(error: BaseException) -> str:
    """Such as " in line 8 of fork.py", if the error comes from a fork's file; else ""."""
    frames = traceback.walk_tb(error.__traceback__)
    own = [x for x in frames if str(x[0].f_globals.get("__name__")).startswith("fork_")]
    return f" in line {own[-1][1]} of {Path(own[-1][0].f_code.co_filename).name}" if own else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA ran out of memory."""
    is_xla = isinstance(error, jax.errors.JaxRuntimeError)
    return is_xla and any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the second if that explains it."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return " ".join([first, *others[: first.endswith(":")]])


def printable(text: str) -> str:
    """The text in one line without control characters, whatever is in a file's name."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_warnings(messages: Iterable[str]) -> None:
    """Prints each message on stderr as one line, `warning: …`."""
    for message in messages:
        print(f"warning: {printable(message)}", file=sys.stderr)
