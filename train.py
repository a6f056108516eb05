"""Trains a network on MNIST: `python train.py --model=cnn`.

Ends with the accuracy on the test images. `--help` lists the flags.
"""

import contextlib
import sys
import time

from mnist_jax import starting

DESCRIPTION = """Trains a network and says how many of the test images it gets right.

Every flag may be left out. Defaults are those of the --preset and --model before --help."""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    started = time.perf_counter()
    with starting.importing():
        from mnist_jax import cli, fit, signals
        from mnist_jax.ops import malloc as memory
        from mnist_jax.parallel import mesh as devices
        from mnist_jax.parallel import processes
        from mnist_jax.reporting.console import Display

    def train() -> None:
        memory.tune_glibc()
        config = cli.parse_config(argv, prog="python train.py", description=DESCRIPTION)
        display = Display()
        notices = devices.keep_compiled(config.compilation_cache)
        import_s = time.perf_counter() - started
        with processes.joined(config), signals.catch_signals() as stop, contextlib.closing(display):
            for notice in notices + processes.not_joined():
                display.on_warning(notice)
            fit(config, observer=display, import_s=import_s, stop=stop)

    status = cli.exit_status(train, debug="--debug" in argv)
    processes.leave(status)
    return status


if __name__ == "__main__":
    starting.begin()
    sys.exit(main(sys.argv[1:]))
