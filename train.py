"""Trains a network on MNIST: `python train.py --model=cnn`.

Ends with the accuracy on the test images. `--help` lists the flags.
"""

import sys
import time


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    started = time.perf_counter()
    try:
        from mnist_jax import cli, fit
        from mnist_jax.display import Display
    except KeyboardInterrupt:  # importing JAX takes a second
        return 130

    import_s = time.perf_counter() - started
    debug = "--debug" in argv

    def train() -> None:
        config = cli.parse_config(argv, prog="train.py", description="Train a network on MNIST.")
        display = Display()
        try:
            fit(config, observer=display, import_s=import_s)
        finally:
            display.close()

    return cli.exit_status(train, debug=debug)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
