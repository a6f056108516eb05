"""Flags into a Config, errors into one line and an exit status."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from mnist_jax.config import Config
from mnist_jax.errors import UsageError, ending, printable

Options = TypeVar("Options")
NARROW = 20  # columns that --help needs


def parse_config(argv: Sequence[str], *, prog: str, description: str) -> Config:
    """A Config from command-line words; `--help` shows the defaults of the preset given.

    Raises:
        UsageError: a flag or a value that is not allowed.
        SystemExit: after `--help`.
    """
    given = _flags(argv, _fields(Config))
    # The preset's values, and the model's options, where no flag says otherwise.
    default = Config(preset=given.get("preset") or "tutorial", model=given.get("model") or "cnn")
    return parse(Config, argv, prog=prog, description=description, default=default)


def parse(
    kind: type[Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Any = None,
) -> Options:
    """An object of the dataclass `kind` from command-line words, a flag for each of its fields.

    Raises:
        UsageError: a flag or a value that is not allowed.
        SystemExit: after `--help`.
    """
    import tyro

    if {"--help", "-h"} & set(argv):
        _explain(kind)
        if shutil.get_terminal_size().columns < NARROW:
            os.environ["COLUMNS"] = str(NARROW)  # in less, tyro's layout does not come to an end
    fields = _fields(kind)
    given = _flags(argv, fields)
    for name, value in given.items():
        # Of several values tyro takes none for a choice.
        if not value and "tuple" in str(fields.get(name)):
            legal = KINDS.get(fields[name], "one or more words")
            raise UsageError(f"--{name} has no value; allowed is {legal}; see --help")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=list(argv),
                default=default,
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        reason = _reason(message.getvalue(), given, fields)
        raise UsageError(f"{reason}; see --help") from None


def _explain(kind: type) -> None:
    """Gives tyro each field's docstring in one piece, or it shows the line breaks of the source."""
    import docstring_parser

    texts = {
        found.arg_name: " ".join((found.description or "").split())
        for owner in reversed(kind.__mro__)
        if dataclasses.is_dataclass(owner)
        for found in docstring_parser.parse_from_object(owner).params
    }
    for field in dataclasses.fields(kind):
        field.metadata = MappingProxyType({**field.metadata, "help": texts.get(field.name)})


KINDS: dict[Any, str] = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    float | None: "a number",
    tuple[int, ...]: "whole numbers with spaces between them",
    tuple[int, ...] | None: "whole numbers with spaces between them",
    tuple[int, int] | None: "two whole numbers with a space between them",
    tuple[float, ...]: "numbers with spaces between them",
    int | Literal["auto"]: "auto or a whole number",
    int | Literal["all"]: "all or a whole number",
    int | Literal["all"] | None: "all or a whole number",
}


def _fields(kind: type) -> dict[str, Any]:
    """The names of a dataclass's fields that are flags, with their types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    # What is annotated is given by its place.
    return {name: kind for name, kind in fields.items() if not hasattr(kind, "__metadata__")}


def _reason(message: str, given: Mapping[str, str], fields: Mapping[str, Any]) -> str:
    """What tyro says in a box of several lines, in one: what was found; what is allowed."""
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", message).split())
    found = re.search(r"(?:Error parsing|Missing value for argument) '?--(\w+)", text)
    if found and found[1] in fields:  # else it is a part of a word that tyro quotes
        value, kind = given.get(found[1]), KINDS.get(fields[found[1]], "a text")
        got = f"is {value!r}" if value else "has no value"
        return f"--{found[1]} {got}; allowed is {kind}"
    choice = r"invalid choice '(.*?)' for argument '--(\w+)'\. Expected one of \((.*?)\)"
    if found := re.search(choice, text):
        allowed = found[3].replace("'", "")
        return f"--{found[2]} is {found[1]!r}; allowed is {allowed}"
    if found := re.search(r"Unrecognized options: (.*?)(?: -{5,}| For full|$)", text):
        exists = os.path.isdir(found[1])  # noqa: PTH112  Path's raises where a name is too long
        meant = "workdir" in fields and "workdir" not in given and exists
        example = f"--workdir={shlex.quote(found[1])}" if meant else "--name=value"
        return f"{found[1]!r} belongs to no flag; a flag is written {example}"
    required = r"Required options.*?: (--\w+|\S+(?: [A-Z]+)*)(?: [A-Z]+)* (.*?)\. .*\(required\)"
    if found := re.search(required, text):
        return f"{found[1]} is missing: {found[2]}"
    if found := re.search(r"Missing value for argument '(\w+)'", text):
        return f"{found[1]} is missing"
    return text.partition(" For full helptext")[0]


def _flags(argv: Sequence[str], fields: Mapping[str, Any]) -> dict[str, str]:
    """The flags among the words, with their values; refuses those that do not exist.

    Raises:
        UsageError: an unknown flag, an empty value, or a value for a flag that takes none.
    """
    switches = {name for name, kind in fields.items() if kind is bool}
    legal = {*fields, *(f"no_{name}" for name in switches)}
    given: dict[str, str] = {}
    name = ""
    for word in argv:
        if not re.match(r"--?[A-Za-z]", word):  # the value, or one of several, of a flag before it
            given[name] = f"{given.get(name, '')} {word}".lstrip()
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if word in ("--help", "-h"):
            continue
        if name not in legal or not word.startswith("--"):
            near = difflib.get_close_matches(name, legal, n=1)
            hint = f"did you mean --{near[0]}? " if near else ""
            raise UsageError(f"unknown flag {word.partition('=')[0]!r}; {hint}see --help")
        if equals and (base := name.removeprefix("no_")) in switches:
            raise UsageError(f"--{name} takes no value; write --{base} or --no_{base}")
        if equals and not value:
            raise UsageError(f"--{name}= has no value; give one or leave the flag out")
        given[name] = value
    return given


def exit_status(command: Callable[[], None], *, debug: bool) -> int:
    """Runs `command`; returns the process's exit status, after one line on stderr if not 0."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without × gets a ? and no error
        sys.stdout.reconfigure(errors="replace")
    try:
        command()
    except (Exception, KeyboardInterrupt) as error:
        status, line = ending(error)
        if debug and status < 128:
            traceback.print_exc()
        if line:
            with contextlib.suppress(OSError):  # whoever read it has gone, and wants the status
                print(printable(line), file=sys.stderr, flush=True)
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    return 0
