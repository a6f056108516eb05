"""All commands but training: `python -m mnist_jax COMMAND …`; `--help` lists them."""

import importlib
import inspect
import sys

from mnist_jax import cli
from mnist_jax.errors import unknown_choice
from mnist_jax.ops import malloc

COMMANDS = {
    "data": "data:PrepareData",
    "predict": "inference.predict:Predict",
    "evaluate": "inference.evaluate:Evaluate",
    "ensemble": "inference.compare:Ensemble",
    "compare": "inference.compare:Compare",
    "report": "reporting.report:Report",
    "verify": "inference.verify:Verify",
    "export": "inference.export:Export",
    "draw": "inference.draw:Draw",
}


def _load(name: str) -> type:
    module, _, kind = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"mnist_jax.{module}"), kind)


def _overview() -> str:
    lines = ["usage: python -m mnist_jax COMMAND …; COMMAND --help explains each one", ""]
    for name in COMMANDS:
        summary = (inspect.getdoc(_load(name)) or "").partition("\n")[0]
        lines.append(f"  {name:9s} {summary}")
    return "\n".join([*lines, "", "To train: python train.py --help"])


def main(argv: list[str]) -> int:
    """Runs a command; returns its exit status."""

    def command() -> None:
        words = [word for word in argv if word != "--debug"]
        if not words or words[0] in ("--help", "-h", "help"):
            print(_overview())
            return
        name = words.pop(0)
        if name not in COMMANDS:
            raise unknown_choice("command", name, COMMANDS)
        kind = _load(name)
        malloc.tune_glibc()
        prog, description = f"python -m mnist_jax {name}", inspect.getdoc(kind) or ""
        cli.parse(kind, words, prog=prog, description=description).run()

    return cli.exit_status(command, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
