"""Flags into a Config, errors into one line and an exit status."""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import jax

from mnist_jax.config import Config
from mnist_jax.errors import DeviceError, MnistJaxError, UsageError


def parse_config(argv: Sequence[str], *, prog: str, description: str) -> Config:
    """A Config from command-line words; `--help` shows the defaults of the preset given.

    Raises:
        UsageError: a flag or a value that is not allowed.
        SystemExit: after `--help`.
    """
    import tyro

    given = _flags(argv)
    # The preset's values, and the model's options, where no flag says otherwise.
    default = Config(preset=given.get("preset") or "post", model=given.get("model") or "cnn")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                Config,
                prog=prog,
                description=description,
                args=list(argv),
                default=default,
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"[^\x20-\x7e]+", " ", message.getvalue())  # tyro draws a box around it
        text = re.sub(r"^.*?Parsing error|For full helptext.*$", "", re.sub(r"\s+", " ", text))
        raise UsageError(f"{text.strip()}; see --help") from None


def _flags(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags among the words, with their values; refuses those that do not exist."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    legal = {*fields, *(f"no_{name}" for name, field in fields.items() if field.type is bool)}
    given: dict[str, str | None] = {}
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in legal | {"help"}:
            near = difflib.get_close_matches(name, legal, n=1)
            hint = f"did you mean --{near[0]}? " if near else ""
            raise UsageError(f"unknown flag '--{name}'; {hint}see --help")
        given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), None)
    return given


def exit_status(command: Callable[[], None], *, debug: bool) -> int:
    """Runs `command`; returns the process's exit status, after one line on stderr if not 0."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without × gets a ? and no error
        sys.stdout.reconfigure(errors="replace")
    try:
        command()
    except KeyboardInterrupt:
        return _report("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has gone: stop, as other commands do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, MnistJaxError):
            return _report(f"error: {error}", error.exit_status)
        if isinstance(error, MemoryError) or _is_out_of_memory(error):
            return _report(
                f"error: out of memory ({_first_line(error)}); a smaller --batch_size helps",
                DeviceError.exit_status,
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return _report(f"error: {error}; free some space on the disk", DeviceError.exit_status)
        return _report(
            f"error: {type(error).__name__}: {_first_line(error)}; this is a bug in mnist_jax; "
            "--debug shows where",
            1,
        )
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _report(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
