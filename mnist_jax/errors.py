"""Errors a user can act on. Each class knows the status its command exits with.

A message is one line: what was found; what is allowed; what to do. Whatever is not an
`MnistJaxError` is a bug and exits with 1.
"""

import difflib
from collections.abc import Iterable


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
