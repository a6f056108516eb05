"""The commands: `python -m mnist_jax COMMAND …`, or `mnist-jax COMMAND …`; `--help` lists them."""

import inspect
import pkgutil
import sys

import jax

from mnist_jax import Config, __version__, cli, fit
from mnist_jax.errors import unknown_choice
from mnist_jax.ops import malloc
from mnist_jax.parallel import distributed

TRAIN = "Trains a network and prints how many of the test images it classifies correctly."
COMMANDS = {  # besides train
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
    return pkgutil.resolve_name(f"mnist_jax.{COMMANDS[name]}")


def _overview() -> str:
    texts = {"train": TRAIN} | {name: inspect.getdoc(_load(name)) or " " for name in COMMANDS}
    lines = (f"  {name:9s} {text.splitlines()[0]}" for name, text in texts.items())
    usage = "usage: python -m mnist_jax COMMAND …; COMMAND --help explains each one"
    return "\n".join([usage, "", *lines])


def train(argv: list[str], prog: str = "python train.py", import_s: float = 0.0) -> int:
    """Trains as the flags say; returns the exit status. import_s: seconds of imports so far."""

    def command() -> None:
        malloc.tune_glibc()
        config = cli.parse(Config, argv, prog=prog, description=TRAIN).resolve()
        fit(config, import_s=import_s)
        jax.distributed.shutdown()

    status = cli.exit_status(command, debug=any(map(cli.is_debug, argv)))
    distributed.leave(status)
    return status


def main(argv: list[str] | None = None) -> int:
    """Runs a command, by default that of the process; returns its exit status."""
    argv = sys.argv[1:] if argv is None else [*argv]
    words = [word for word in argv if not cli.is_debug(word)]
    if words[:1] == ["train"]:
        argv.remove("train")
        return train(argv, "python -m mnist_jax train")

    def command() -> None:
        if not words or words[0] in ("--help", "-h", "help"):
            print(_overview())
            return
        if words[0] == "--version":
            print(f"mnist_jax {__version__}, jax {jax.__version__}")
            return
        name = words.pop(0)
        if name not in COMMANDS:
            raise unknown_choice("command", name, ["train", *COMMANDS])
        kind = _load(name)
        malloc.tune_glibc()
        prog, description = f"python -m mnist_jax {name}", inspect.getdoc(kind) or ""
        cli.parse(kind, words, prog=prog, description=description).run()

    return cli.exit_status(command, debug=len(words) < len(argv))


if __name__ == "__main__":
    sys.exit(main())
