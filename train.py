"""Trains a network on MNIST: `python train.py --model=cnn`. `--help` explains the flags."""

import signal
import sys
import time

if __name__ == "__main__":  # while JAX is imported, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
STARTED = time.perf_counter()

import jax  # noqa: E402

from mnist_jax import Config, cli, fit, reporting  # noqa: E402
from mnist_jax.ops import malloc  # noqa: E402
from mnist_jax.parallel import distributed, mesh  # noqa: E402
from mnist_jax.signals import catch_signals  # noqa: E402

IMPORT_S = time.perf_counter() - STARTED

DESCRIPTION = "Trains a network and prints how many of the test images it classifies correctly."


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def train() -> None:
        malloc.tune_glibc()
        config = cli.parse(Config, argv, prog="python train.py", description=DESCRIPTION).resolve()
        warnings = distributed.initialize(
            config.coordinator, config.num_processes, config.process_id
        )
        warnings += mesh.enable_compilation_cache(config.compilation_cache)
        callbacks = reporting.make_callbacks(config)
        for warning in warnings:
            callbacks[-1].on_warning(warning)  # the console
        with catch_signals() as stop:
            fit(config, callbacks=callbacks, import_s=IMPORT_S, stop=stop)
        jax.distributed.shutdown()

    advice = "use a smaller --batch_size or --seeds"
    status = cli.exit_status(train, debug="--debug" in argv, save_memory=advice)
    distributed.leave(status)
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
