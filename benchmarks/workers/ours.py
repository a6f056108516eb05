"""This project: the programs of `mnist_jax.trainer.make_steps`, called as `Trainer` calls them.

The images lie on the device as uint8; the state is donated and the metrics are summed.
"""

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import monitoring

from benchmarks.workers import job as jobs
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.errors import DeviceError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.ops import malloc
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel import mesh as meshes
from mnist_jax.trainer import EVAL_BATCH_SIZE, dynamic_loop_bound, make_steps

MANY, ONE, HOST = "many steps a call", "one dispatch a step", "host arrays"
CACHE_HIT = "/jax/compilation_cache/cache_hits"
HITS: list[str] = []  # programs that came from JAX's cache in this process
monitoring.register_event_listener(
    lambda event, **kwargs: HITS.extend([event] * (event == CACHE_HIT))
)


class Loop:
    """A program that runs a number of steps; for each number, or once for all, it is compiled.

    Attributes:
        compile_s: seconds of tracing and compiling so far.
    """

    def __init__(self, program: Any, mesh: jax.sharding.Mesh):
        self._program, self._mesh = program, mesh
        self._dynamic = dynamic_loop_bound(mesh.devices.flat[0])
        self._programs: dict[int | None, Any] = {}
        self._lengths: dict[int, Any] = {}  # on the device: no copy to it inside the clock
        self.compile_s = 0.0

    def compile(self, *args: Any, steps: int) -> Any:
        """The program for arguments of these shapes and that many steps.

        Raises:
            DeviceError: a CPU has less memory than it needs; the system would end the process.
        """
        key = None if self._dynamic else steps
        if key not in self._programs:
            started = time.perf_counter()
            length = self._length(steps) if self._dynamic else steps
            compiled = self._program.lower(*args, length).compile()
            self.compile_s += time.perf_counter() - started
            malloc.trim()
            if self._mesh.devices.flat[0].platform == "cpu":
                room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
                if (needed := self._mesh.size * program_bytes(compiled)) > room:
                    raise DeviceError(
                        f"out of memory: the program needs {needed / 1e9:.1f} GB of "
                        f"{room / 1e9:.1f}; choose a smaller --batch_size"
                    )
            self._programs[key] = compiled
        return self._programs[key]

    def _length(self, steps: int) -> Any:
        if steps not in self._lengths:
            self._lengths[steps] = meshes.put(np.int32(steps), meshes.replicated(self._mesh))
        return self._lengths[steps]

    def __call__(self, *args: Any, steps: int) -> Any:
        """Runs that many steps."""
        length = [self._length(steps)] if self._dynamic else []
        return self.compile(*args, steps=steps)(*args, *length)


def program_bytes(compiled: Any) -> int:
    """The memory of a program's arguments, results and temporaries; donated ones once."""
    found = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(sizes - found.alias_size_in_bytes)


def make(
    job: jobs.Job, data: jobs.Data, devices: Sequence[jax.Device] | None = None
) -> jobs.Workload:
    """The package's own training and evaluation with the preset tutorial.

    Call it, and what it returns, at the matrix precision of the job (`MATMUL_PRECISION`).

    Args:
        job: what to do; its mode is MANY, ONE or HOST.
        data: what to train on.
        devices: what a batch is divided among; None for the first of the job's platform.
    """
    config = Config(
        model=job.model, batch_size=job.batch_size, precision=job.precision, seeds=job.seeds
    ).resolve()
    mesh = meshes.make_mesh(devices or [meshes.select_device(job.platform)], job.seeds)
    device, dynamic = mesh.devices.flat[0], dynamic_loop_bound(mesh.devices.flat[0])
    dtype = meshes.compute_dtype(job.precision, device)
    model = MODELS[job.model](dtype=dtype, **config.model_options())
    tx, step_config = make_optimizer(config, 1), steps.make_step_config(config)
    programs = make_steps(
        model,
        tx,
        mesh,
        train_size=job.train_size,
        batch_size=job.batch_size,
        step_config=step_config,
        members=job.seeds is not None,
    )
    train_steps, eval_steps = Loop(programs.train_steps, mesh), Loop(programs.eval_steps, mesh)
    put = partial(meshes.put, sharding=meshes.replicated(mesh))
    keys, order = jax.random.key(config.seed), data.order
    if job.seeds is not None:
        keys = jax.vmap(jax.random.key)(np.array(config.all_seeds(), np.uint32))
        order = np.stack([np.roll(order, i) for i in range(job.seeds)])
    keys = jax.random.wrap_key_data(put(jax.random.key_data(keys)))
    split, test = put((Split(data.image, data.label), Split(data.test_image, data.test_label)))
    order, metrics = put((order, Metrics.zeros(job.seeds)))
    epoch = max(1, job.train_size // job.batch_size)
    firsts = put([np.int32(i) for i in range(min(epoch, 1000))])  # no copy inside the clock
    longest = epoch if dynamic else min(epoch, job.steps_per_call)
    # Of ten steps a tenth can be done twice, of fewer none.
    unit = longest if job.mode == MANY and not dynamic else 10 if job.slow_down else 1
    # Several calls in flight at once block each other on the devices of one CPU.
    settle = jax.block_until_ready if mesh.size > 1 and dynamic else (lambda x: x)

    def slowed(count: int) -> int:
        return round((1 + job.slow_down) * count)

    def many(state: Any, count: int) -> Any:
        for done in range(0, count, longest):
            args = state, metrics, split, order, keys, firsts[0]
            state, _ = settle(train_steps(*args, steps=slowed(min(longest, count - done))))
        return state

    def one(state: Any, count: int) -> Any:
        sums = metrics
        for i in range(slowed(count)):
            args = state, sums, split, order, keys, firsts[i % len(firsts)]
            state, sums = settle(train_steps(*args, steps=1))
        return state

    step = partial(steps.train_step, model=model, tx=tx, step_config=step_config)
    step = jax.jit(step, donate_argnums=0)
    mask = np.ones(job.batch_size, bool)

    def host(state: Any, count: int) -> Any:
        for i in range(count):
            index = data.batch_index(i, job.batch_size)
            batch = {"image": data.image[index], "label": data.label[index], "mask": mask}
            state, _ = step(state, jax.device_put(batch, device), keys)
        return state

    def evaluate(state: Any) -> Any:
        batches = steps.num_batches(job.test_size, EVAL_BATCH_SIZE)
        return settle(eval_steps(state.params, metrics, test, firsts[0], steps=batches))

    state, program = programs.init_state(keys), None
    details: dict[str, Any] = {
        f"{name}_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in (("params", state.params), ("optimizer", state.opt_state))
    }
    if job.mode != HOST and "train" in job.what:
        hits, args = len(HITS), (state, metrics, split, order, keys, firsts[0])
        program = train_steps.compile(*args, steps=slowed(unit) if job.mode == MANY else 1)
        details |= {
            "temporaries_bytes": program.memory_analysis().temp_size_in_bytes,
            "program_bytes": program_bytes(program),
            "compile_s": train_steps.compile_s,
            "compiled": "from the cache" if len(HITS) > hits else "afresh",
        }
    train = {MANY: many, ONE: one, HOST: host}[job.mode]
    sync = jax.block_until_ready
    return jobs.Workload(state, train, evaluate, sync, {}, details, unit, program=program)


if __name__ == "__main__":
    malloc.tune_glibc()  # as train.py does
    with jax.default_matmul_precision(meshes.MATMUL_PRECISION[jobs.asked().precision]):
        jobs.main(make)
