"""What a command does before JAX is imported, which takes a second: so this imports little."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path


def begin() -> None:
    """For the process's owner, first of all: signals end it, and its output has a place to go.

    Until there is something to save, Ctrl-C and SIGTERM end the process at once. An exception that
    is raised at any moment can be lost: in an import, in a callback of the garbage collector.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    for name in ("stdout", "stderr"):  # None where the caller has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  for all of the process


def _leave(number: int, _: object) -> None:
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # a spinner hides the cursor
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the imports of all else: what is missing, or JAX refuses, is said in one line.

    Raises:
        SystemExit: with 1 or 2.
    """
    try:
        yield
    except ImportError as error:
        print(f"error: {error}; install what is needed with: pip install .", file=sys.stderr)
        sys.exit(1)
    except ValueError as error:  # JAX reads its variables while it is imported
        print(
            f"error: {error}; that is the value of an environment variable JAX_..., or of one that "
            "an import reads; correct it or unset it",
            file=sys.stderr,
        )
        sys.exit(2)
