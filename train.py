"""Trains a network on MNIST: `python train.py --model=cnn`.

Ends with the accuracy on the test images. `--help` lists the flags.
"""

import contextlib
import os
import signal
import sys
import time

DESCRIPTION = """Trains a network and says how many of the test images it gets right.

Every flag may be left out. Defaults are those of the --preset and --model before --help."""


def _leave(number: int, _: object) -> None:
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # a spinner hides the cursor
    os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    started = time.perf_counter()
    try:
        from mnist_jax import cli, devices, fit, memory, processes, signals
        from mnist_jax.display import Display
    except ImportError as error:
        print(f"error: {error}; install what is needed with: pip install .", file=sys.stderr)
        return 1

    def train() -> None:
        memory.keep_freed()
        config = cli.parse_config(argv, prog="python train.py", description=DESCRIPTION)
        display = Display()
        notices = devices.keep_compiled(config.compilation_cache)
        import_s = time.perf_counter() - started
        with processes.joined(config), signals.heard() as stop, contextlib.closing(display):
            for notice in notices + processes.not_joined():
                display.on_notice(notice)
            fit(config, observer=display, import_s=import_s, stop=stop)

    status = cli.exit_status(train, debug="--debug" in argv)
    processes.leave(status)
    return status


if __name__ == "__main__":
    # Until training begins there is nothing to save, and an exception that is raised at any moment
    # can be lost: in an import, in a callback of the garbage collector.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    sys.exit(main(sys.argv[1:]))
