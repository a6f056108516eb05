"""Trains a network on MNIST: `python train.py --model=cnn`.

Ends with the accuracy on the test images. `--help` lists the flags.
"""

import sys
import time


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    started = time.perf_counter()
    try:
        from mnist_jax import cli, devices, fit
        from mnist_jax.display import Display
    except ImportError as error:
        print(f"error: {error}; install what is needed with: pip install .", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # importing JAX takes a second
        print("interrupted", file=sys.stderr)
        return 130

    def train() -> None:
        config = cli.parse_config(argv, prog="train.py", description="Train a network on MNIST.")
        display = Display()
        for notice in devices.keep_compiled(config.compilation_cache):
            display.on_notice(notice)
        try:
            fit(config, observer=display, import_s=time.perf_counter() - started)
        finally:
            display.close()

    return cli.exit_status(train, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
