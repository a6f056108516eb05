"""Trains a network on MNIST: `python train.py --model=cnn`. `--help` explains the flags."""

import signal
import sys
import time

HANDLER = signal.getsignal(signal.SIGINT)
if __name__ == "__main__":  # while JAX is imported, Ctrl-C ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
STARTED = time.perf_counter()

from mnist_jax.__main__ import train  # noqa: E402

IMPORT_S = time.perf_counter() - STARTED


def main(argv: list[str]) -> int:
    """Command line → `Config` → `fit` → exit status."""
    return train(argv, import_s=IMPORT_S)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, HANDLER)
    sys.exit(main(sys.argv[1:]))
