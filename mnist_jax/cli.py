"""Command lines into dataclasses, and errors into one line and an exit status."""

import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import jax

from mnist_jax import errors, signals
from mnist_jax.errors import DeviceError, UsageError, first_line

Options = TypeVar("Options")
PROCESS_FAILURES = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination service")
# Other names of flags, from the habits of other programs.
ALIASES = {"--lr": "--learning_rate", "--bs": "--batch_size", "--device": "--platform"}
ALIASES |= {"--gpu": "--platform=gpu", "--cpu": "--platform=cpu", "--no-cuda": "--platform=cpu"}
ALIASES["--no_cuda"] = ALIASES["--no-cuda"]


def parse(kind: type[Options], argv: Sequence[str], *, prog: str, description: str) -> Options:
    """An object of the dataclass `kind` from command-line words; each field is a flag.

    Exits after `--help`, or after a wrong flag with a message; raises UsageError if --options is
    given twice, and what the dataclass raises.
    """
    import tyro

    about: dict[str, Any] = {"prog": prog, "description": description, "use_underscores": True}
    if {"-h", "--help"} & set(argv):
        with contextlib.suppress(SystemExit):
            tyro.cli(_shown(kind), args=["--help"], config=(tyro.conf.DisallowNone,), **about)
        for words in getattr(kind, "EXAMPLES", ()):
            print(f"example: {prog} {words}")
        sys.exit()
    times = sum(word.partition("=")[0] == "--options" for word in argv)
    if times > 1 and hasattr(kind, "options"):
        raise UsageError("--options is given twice; write it once, followed by all words")
    switches = [name for name in dir(kind) if isinstance(getattr(kind, name), bool)]
    words = [_canonical(word, switches) for word in argv]
    # A message about another wrong value does not name None among the allowed ones.
    given_none = any("None" in word for word in argv)
    return tyro.cli(kind, args=words, config=[tyro.conf.DisallowNone][given_none:], **about)


def is_debug(word: str) -> bool:
    """Whether the word asks for tracebacks: every command takes it."""
    return word.lower() in ("--debug", "--debug=true")


def _canonical(word: str, switches: Sequence[str]) -> str:
    """A word of the command line without aliases, and --flag for --flag=True."""
    name, equals, value = word.partition("=")
    is_switch = name.startswith("--") and name[2:].replace("-", "_") in switches
    if is_switch and value.lower() in ("true", "false"):
        return name if value.lower() == "true" else f"--no{name[1:]}"
    return ALIASES.get(name, name) + equals + value


def _shown(kind: Any) -> type:
    """`kind` as `--help` shows it. Its GROUPS are nested dataclasses: tyro titles only those."""
    import docstring_parser
    from tyro.conf import arg

    texts = {
        param.arg_name: " ".join((param.description or "").split())
        for owner in reversed(kind.__mro__)
        if dataclasses.is_dataclass(owner)
        for param in docstring_parser.parse_from_object(owner).params
    }

    def flag(field: dataclasses.Field[Any]) -> tuple[str, Any, Any]:
        text, default, form = texts.get(field.name, ""), field.default, field.type
        hint = None if default is dataclasses.MISSING else f"Default: {default}."
        if default in (None, ()):  # the text may say what that means
            text, _, meaning = text.partition(" None: ")
            hint = meaning and f"Default: {meaning}"
        several = [part for part in get_args(form) if get_origin(part) is tuple]
        if isinstance(form, UnionType) and several:  # of "one value or several" the longer form
            form, default = several[0], ()
        about = arg(help=text, help_behavior_hint=hint, prefix_name=False)
        return field.name, Annotated[form, about], dataclasses.field(default=default)

    flags = {field.name: flag(field) for field in dataclasses.fields(kind)}
    groups = [
        (title, dataclasses.make_dataclass(title, map(flags.pop, names.split())))
        for title, names in getattr(kind, "GROUPS", {}).items()
    ]
    return dataclasses.make_dataclass("Shown", [*flags.values(), *groups], kw_only=True)


def exit_status(command: Callable[[], None], *, debug: bool) -> int:
    """Runs `command`; returns the process's exit status, after one line on stderr if it is not 0.

    With `debug` the traceback comes before the line.
    """
    sys.stdout = sys.stdout or io.StringIO()  # a process may have none
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without × prints ?
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            with signals.repeat_dropped_interrupts():
                command()
        finally:  # so that a reader who is gone is noticed here
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`: end quietly, as other commands do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, which Windows lacks
    except (Exception, KeyboardInterrupt) as error:
        status, line = _status_and_line(error)
        if debug and status < 128:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # nobody reads stderr
            print(errors.printable(line), file=sys.stderr, flush=True)
        return status
    return 0


def _status_and_line(error: BaseException) -> tuple[int, str]:
    if isinstance(error, errors.InterruptedRunError | errors.WorseError):  # an outcome
        return error.exit_status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, errors.MnistJaxError):
        return error.exit_status, f"error: {error}"
    if isinstance(error, FloatingPointError):  # of JAX_DEBUG_NANS
        status = errors.NonFiniteError.exit_status
        return status, f"error: {first_line(error)}; --debug shows where"
    if isinstance(error, MemoryError) or errors.is_out_of_memory(error):
        advice = "use another --platform, a smaller --batch_size or network, or fewer --seeds"
        return DeviceError.exit_status, f"error: out of memory ({first_line(error)}); {advice}"
    # A collective that fails raises a JaxRuntimeError or, on a CPU, a ValueError.
    is_failure = any(word in str(error) for word in PROCESS_FAILURES)
    if jax.distributed.is_initialized() and is_failure:
        return DeviceError.exit_status, (
            f"error: another process has probably ended ({first_line(error)}); its output says "
            "why; the same commands with the run's folder as --workdir resume the run"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        advice = "check the disk" if error.errno == errno.EIO else "free some space on the disk"
        return DeviceError.exit_status, f"error: {error}; {advice}"
    if isinstance(error, ImportError):
        return 1, f"error: {error}; install mnist_jax again, with its dependencies"
    return 1, (
        f"error: {type(error).__name__}: {first_line(error)}; this is a bug in mnist_jax; "
        "--debug shows where"
    )
