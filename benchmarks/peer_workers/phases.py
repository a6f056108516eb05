"""The phases of a start of this project, up to the first step: for `benchmarks.startup`."""

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(question: dict[str, Any]) -> dict[str, Any]:
    """Times each phase once; every one ends when its work is finished."""
    seconds, last = {}, time.perf_counter()

    def phase(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name] = now - last
        last = now

    import jax
    import jax.numpy as jnp

    from benchmarks.peer_workers import ours
    from mnist_jax import load_dataset
    from mnist_jax.config import Config
    from mnist_jax.metrics import Metrics
    from mnist_jax.ops import malloc as memory
    from mnist_jax.parallel import mesh as devices
    from mnist_jax.runs import environment

    memory.tune_glibc()
    phase("import")
    dataset = load_dataset(question["dataset"], data_dir=question["data_dir"])
    phase("data")
    devices.keep_compiled(Path(question["cache"]))
    config = Config(model=question["model"])
    device = jax.devices()[0]
    programs = ours.programs(config, device, len(dataset.train.label))
    key = jax.random.key(config.seed)
    start = (
        programs.init_state(key),
        jax.device_put(dataset.train, device),
        programs.epoch_permutation(key, 0),
    )
    state, split, order = jax.block_until_ready(start)
    one = jnp.int32(1) if device.platform == "cpu" else 1
    args = (state, Metrics.zeros(), split, order, key, jnp.int32(0))
    phase("init")
    lowered = programs.train_steps.lower(*args, one)
    phase("trace")
    compiled = lowered.compile()
    phase("compile")
    jax.block_until_ready(compiled(*args, *([one] if device.platform == "cpu" else [])))
    phase("first_step")
    return seconds | {"context": environment.describe(device)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
