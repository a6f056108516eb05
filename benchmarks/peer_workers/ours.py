"""This project: `steps.train_steps`, compiled and called as `mnist_jax.trainer` does it.

The images lie on the device as uint8; a call gathers, normalises and trains on as many batches as
a sample has steps, with the state donated and the metrics summed. One dispatch a step is the same
program, called with one step at a time and never waited for within a sample.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer_workers import job as jobs
from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.errors import DeviceError
from mnist_jax.metrics import Metrics
from mnist_jax.models import MODELS
from mnist_jax.ops import malloc as memory
from mnist_jax.optimizer import make_optimizer, step_config
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.mesh import Layout
from mnist_jax.runs import environment
from mnist_jax.trainer import Steps, dynamic_loop_bound, make_steps

MANY, ONE = "many steps a call", "one dispatch a step"


def programs(
    config: Config, device: jax.Device, train_size: int, layout: Layout | None = None
) -> Steps:
    """Those of a run, not yet compiled."""
    dtype = devices.compute_dtype(config.precision, device)
    return make_steps(
        MODELS[config.model](dtype=dtype, **config.model_options()),
        make_optimizer(config, 1),
        device,
        train_size=train_size,
        batch_size=config.batch_size,
        recipe=step_config(config),
        layout=layout,
    )


class AnyLength:
    """A loop's program, compiled when it is first called with a length that it needs.

    `analysis` is what the compiler says of the memory of the last one compiled, on each of `count`
    devices.

    Raises:
        DeviceError: when called, if the program needs more memory than there is.
    """

    def __init__(self, program: Any, device: jax.Device, count: int = 1):
        self._program, self._device, self._count = program, device, count
        self._compiled: dict[int | None, Any] = {}
        self.analysis: Any = None

    def compile(self, *args: Any, count: int) -> Any:
        """The program for arguments of these shapes and that many steps."""
        any_length = dynamic_loop_bound(self._device)
        key = None if any_length else count
        if key not in self._compiled:
            lowered = self._program.lower(*args, jnp.int32(count) if any_length else count)
            compiled = lowered.compile()
            memory.trim()
            self.analysis = compiled.memory_analysis()
            # A CPU's system would rather end the process than refuse the memory.
            _check_fits(self.analysis, self._device, self._count)
            self._compiled[key] = compiled
        return self._compiled[key]

    def __call__(self, *args: Any, count: int) -> Any:
        """Runs that many steps."""
        length = [np.int32(count)] if dynamic_loop_bound(self._device) else []
        return self.compile(*args, count=count)(*args, *length)


def _check_fits(analysis: Any, device: jax.Device, count: int) -> None:
    # All devices of a CPU share its memory.
    parts = count if device.platform == "cpu" else 1
    room, needed = devices.memory_bytes(device), parts * needed_bytes(analysis)
    if room is not None and needed > room:
        raise DeviceError(
            f"out of memory: the program needs {needed / 1e9:.1f} GB of {room / 1e9:.1f}; "
            "choose a smaller --batch_size"
        )


def needed_bytes(analysis: Any) -> int:
    """The memory of a program's arguments, results and temporaries; donated ones once."""
    sizes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return int(sizes + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes)


def make(
    job: jobs.Job,
    data: jobs.Data,
    device: jax.Device | None = None,
    layout: Layout | None = None,
) -> jobs.Workload:
    """The package's own training and evaluation, at the default recipe.

    To be called, and what it returns used, at the matrix precision that belongs to the job's.

    Args:
        job: what to do.
        data: on what.
        device: where; the first of the job's platform for None.
        layout: in its place, the devices that a batch is spread over.
    """
    config = Config(model=job.model, batch_size=job.batch_size, precision=job.precision)
    layout = layout or Layout((device or devices.select_device(job.platform),))
    device, count = layout.devices[0], len(layout.devices)
    compiled = programs(config, device, job.train_size, layout)
    train_steps = AnyLength(compiled.train_steps, device, count)
    eval_steps = AnyLength(compiled.eval_steps, device, count)
    key_data, split, test, order = layout.place(
        (
            np.asarray(jax.random.key_data(jax.random.key(config.seed))),
            Split(data.image, data.label),
            Split(data.test_image, data.test_label),
            data.order,
        )
    )
    root_key = jax.random.wrap_key_data(key_data)
    first, sums = np.int32(0), Metrics.zeros()
    epoch = max(1, job.train_size // job.batch_size)
    # An accelerator's loops are compiled for one length: an epoch, or a step.
    any_length = dynamic_loop_bound(device)
    unit = 1 if any_length or job.mode == ONE else epoch
    # Of several calls under way the devices of a CPU would each wait in another, for ever.
    virtual = layout.devices[0].platform == "cpu" and count > 1

    def settled(result: Any) -> Any:
        return jax.block_until_ready(result) if virtual else result

    def many(state: steps.TrainState, count: int) -> steps.TrainState:
        for done in range(0, count, epoch):
            some = min(epoch, count - done)
            state, _ = settled(train_steps(state, sums, split, order, root_key, first, count=some))
        return state

    def one(state: steps.TrainState, count: int) -> steps.TrainState:
        carried = sums
        for i in range(count):
            args = state, carried, split, order, root_key, np.int32(i % epoch)
            state, carried = settled(train_steps(*args, count=1))
        return state

    def evaluate(state: steps.TrainState, batches: int) -> Metrics:
        return settled(eval_steps(state, sums, test, first, count=batches))

    state = compiled.init_state(root_key)
    train_steps.compile(state, sums, split, order, root_key, first, count=unit)  # or is refused
    train = one if job.mode == ONE else many
    return jobs.Workload(
        state,
        train,
        evaluate,
        jax.block_until_ready,
        environment.describe(device),
        multiple_of=unit,
        any_length=any_length,
        whole=not any_length,
        analysis=train_steps.analysis,
    )


if __name__ == "__main__":
    memory.tune_glibc()  # as train.py does
    with jax.default_matmul_precision(devices.MATMUL_PRECISION[jobs.asked().precision]):
        jobs.main(make)
