"""`train.py` with clocks around its parts: for `benchmarks.ledger`.

    python -m benchmarks.peer_workers.accounts '{"started": 12.3, "words": ["--model=mlp"]}'

runs it with these words and prints one JSON object as its last line: the seconds of each part since
`started`, which the asking process read from the same monotonic clock.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

READ = time.monotonic()  # before anything else is imported


class Accounts:
    """Clocks of which one runs at a time: a part that begins inside another takes its clock over.

    Args:
        started: when the first part began.
        part: its name.
    """

    def __init__(self, started: float, part: str):
        self.seconds: dict[str, float] = {}
        self._running = [part]
        self._since = started

    def _settle(self) -> None:
        now = time.monotonic()
        part = self._running[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def turn_to(self, part: str) -> None:
        """The running part ends and this one begins."""
        self._settle()
        self._running[-1] = part

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Gives this part the clock meanwhile."""
        self._settle()
        self._running.append(name)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def wrap(self, owner: Any, name: str, part: Any) -> None:
        """Gives each call of `owner.name` to a part: a name, or a function of its arguments."""
        call = getattr(owner, name)

        def accounted(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args)):
                return call(*args, **kwargs)

        setattr(owner, name, accounted)


def wrap_parts(accounts: Accounts) -> None:
    """Puts clocks around the parts of a run."""
    import jax

    from mnist_jax import cli, training
    from mnist_jax import trainer as programs
    from mnist_jax.ops import malloc as memory
    from mnist_jax.parallel import mesh as devices
    from mnist_jax.reporting import console as display
    from mnist_jax.runs import checkpoint, environment
    from mnist_jax.runs import results as record
    from mnist_jax.runs import run_dir as runs

    called = set()

    def kind(_: Any, name: str, program: Any, *__: Any) -> str:
        first, _ = program not in called, called.add(program)
        if first:
            return "first calls"
        return "training" if name == "train_s" else "evaluation"

    accounts.wrap(cli, "parse_config", "flags")
    accounts.wrap(devices, "select_device", "device")
    accounts.wrap(training, "load_dataset", "data")
    accounts.wrap(environment, "describe", "environment")
    accounts.wrap(programs.Trainer, "__init__", "data to device")
    accounts.wrap(training, "check_memory", "trace")
    accounts.wrap(programs.Trainer, "init", "initial state")
    accounts.wrap(training.Keeper, "restore", "checkpoints")
    accounts.wrap(record, "outcome", "digest")
    accounts.wrap(programs.Trainer, "_call", kind)
    accounts.wrap(programs.Trainer, "_compile", "trace")
    for name in ("check_model", "param_shapes"):
        accounts.wrap(training, name, "trace")
    accounts.wrap(jax.stages.Lowered, "compile", "compile")
    accounts.wrap(memory, "give_back", "compile")
    for name in ("save", "wait", "close"):
        accounts.wrap(checkpoint.CheckpointManager, name, "checkpoints")
    for name in ("__init__", "write_environment", "write_metrics", "append_metrics", "finish"):
        accounts.wrap(runs.Run, name, "run's files")
    for name in (
        "on_load",
        "on_train_begin",
        "on_chunk_end",
        "on_epoch_end",
        "on_train_end",
        "close",
    ):
        accounts.wrap(display.Display, name, "display")


def main(question: dict[str, Any]) -> int:
    """Runs `train.py` and prints the parts."""
    accounts = Accounts(question["started"], "start")
    accounts.seconds["start"] = READ - question["started"]
    accounts._since = READ
    accounts.turn_to("import")
    import train

    wrap_parts(accounts)
    accounts.turn_to("unaccounted")
    status = train.main(question["words"])
    accounts.turn_to("unaccounted")
    print(json.dumps({"seconds": accounts.seconds, "status": status}))
    return status


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
