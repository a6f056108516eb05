"""Everything but training: `python -m mnist_jax COMMAND …`. `--help` lists the commands."""

import importlib
import inspect
import sys
from collections.abc import Mapping

from mnist_jax import starting

COMMANDS = {
    "data": "commands.data:Data",
    "predict": "commands.predict:Predict",
    "evaluate": "commands.evaluate:Evaluate",
    "ensemble": "commands.voting:Ensemble",
    "compare": "commands.voting:Compare",
    "report": "commands.report:Report",
    "verify": "commands.verify:Verify",
    "export": "commands.export:Export",
    "draw": "commands.draw:Draw",
}


def _load(name: str) -> type:
    module, _, kind = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"mnist_jax.{module}"), kind)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _overview(commands: Mapping[str, type]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}s}  {_first_line(kind)}" for name, kind in commands.items()]
    usage = "usage: python -m mnist_jax COMMAND …; each explains itself with --help\n"
    after = "\n--debug shows the traceback of an error. To train: python train.py --help"
    return "\n".join([usage, *lines, after])


def main(argv: list[str]) -> int:
    """Runs a command; returns its exit status."""
    with starting.importing():
        from mnist_jax import cli, errors
        from mnist_jax.ops import malloc as memory

    def command() -> None:
        if not set(argv) - {"--debug"} or argv[0] in ("--help", "-h", "help"):
            print(_overview({name: _load(name) for name in COMMANDS}))
            return
        name, *words = (word for word in argv if word != "--debug")
        if name not in COMMANDS:
            raise errors.unknown_choice("command", name, COMMANDS)
        kind = _load(name)
        prog = f"python -m mnist_jax {name}"
        description = inspect.getdoc(kind) or ""
        memory.tune_glibc()
        cli.parse(kind, words, prog=prog, description=description).run()

    return cli.exit_status(command, debug="--debug" in argv)


if __name__ == "__main__":
    starting.begin()
    sys.exit(main(sys.argv[1:]))
