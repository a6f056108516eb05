"""Trains a network on MNIST: `python train.py --model=cnn`. `--help` explains the flags."""

import sys
import time

STARTED = time.perf_counter()

from mnist_jax.__main__ import train  # noqa: E402

IMPORT_S = time.perf_counter() - STARTED


def main(argv: list[str]) -> int:
    """Command line → `Config` → `fit` → exit status."""
    return train(argv, import_s=IMPORT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
