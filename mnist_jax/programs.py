"""A run's compiled programs, with the time to compile them kept apart from the time they take."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mnist_jax import devices, steps
from mnist_jax.data import Dataset
from mnist_jax.metrics import MetricSums

# Images a batch when evaluating. Fixed, so that sums are rounded the same way in every run; small
# enough for each of the CNN's activations to stay under 60 MB.
EVAL_BATCH_SIZE = 250
CALL_S = 1.0  # what one call aims to last on a CPU, so that progress shows and Ctrl-C is heard
CALIBRATION_STEPS = 2


def takes_any_length(device: jax.Device) -> bool:
    """Whether a loop's length is an argument of the program there, and not a part of it."""
    return device.platform == "cpu"


class Jitted(NamedTuple):
    """The functions of `steps` that a run compiles, with model, optimizer and sizes filled in.

    `train_steps` donates its state, unless told not to. Their last argument, `steps`, is an int32
    array where a loop takes any length, and otherwise a Python int.
    """

    init_state: Any
    epoch_order: Any
    train_steps: Any
    eval_steps: Any


def jitted(
    model: nn.Module,
    tx: optax.GradientTransformation,
    device: jax.Device,
    *,
    train_size: int,
    batch_size: int,
    normalize: bool,
    donate: bool = True,
) -> Jitted:
    """The programs of a run on `device`, compiled when they are first called."""
    static = () if takes_any_length(device) else ("steps",)
    common = {"model": model, "normalize": normalize}
    train_steps = partial(steps.train_steps, tx=tx, batch_size=batch_size, **common)
    eval_steps = partial(steps.eval_steps, batch_size=EVAL_BATCH_SIZE, **common)
    return Jitted(
        jax.jit(partial(steps.init_state, model=model, tx=tx)),
        jax.jit(partial(steps.epoch_order, size=train_size)),
        jax.jit(train_steps, static_argnames=static, donate_argnames="state" if donate else ()),
        jax.jit(eval_steps, static_argnames=static),
    )


class Programs:
    """Everything of a run that is compiled, and the data it works on, on one device.

    On a CPU one program serves any number of steps, which it takes as an argument. On an
    accelerator a loop of known length runs without asking the host after each step, so there each
    length (an epoch, and the rest if the run ends inside one) is compiled when first met.

    Attributes:
        seconds: compile_s, train_s and eval_s so far, each of finished work.
    """

    def __init__(
        self,
        model: nn.Module,
        tx: optax.GradientTransformation,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        normalize: bool,
        steps_per_call: int | Literal["auto"],
        device: jax.Device,
        deterministic: bool = False,
        debug: bool = False,
    ):
        self.seconds = {"compile_s": 0.0, "train_s": 0.0, "eval_s": 0.0}
        self.any_length = takes_any_length(device)
        self.steps_per_call = steps_per_call
        self.train_size, self.test_size = len(dataset.train.label), len(dataset.test.label)
        self.batch_size = batch_size
        self.root_key = jax.random.key(seed, impl="threefry2x32")
        # The one transfer of images: from here on they stay on the device, as uint8.
        self.train_split, self.test_split = jax.device_put((dataset.train, dataset.test), device)
        self._jitted = jitted(
            model,
            tx,
            device,
            train_size=self.train_size,
            batch_size=batch_size,
            normalize=normalize,
            donate=not debug,  # so that a step can be run again
        )
        self._compiler_options = devices.compiler_options(device, deterministic=deterministic)
        self._train_step = partial(steps.train_step, model=model, tx=tx, normalize=normalize)
        self._compiled: dict[tuple[Any, int | None], Any] = {}
        self._calibrated: dict[Any, int] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch, the last and smaller batch included."""
        return steps.num_batches(self.train_size, self.batch_size)

    def init(self) -> steps.TrainState:
        """Fresh parameters and optimizer."""
        return self._compile(self._jitted.init_state, self.root_key)(self.root_key)

    def order(self, epoch: int) -> jax.Array:
        """The epoch's order of the training images; epochs count from 0."""
        args = self.root_key, jnp.int32(epoch)
        compiled = self._compile(self._jitted.epoch_order, *args)
        return compiled(*args)  # its time is part of the next call's

    def train(
        self, state: steps.TrainState, sums: MetricSums, order: jax.Array, first: int, end: int
    ) -> tuple[steps.TrainState, MetricSums, int]:
        """One call of `steps.train_steps` from batch `first`, at most to batch `end`.

        Returns:
            The new state (the old one is donated), the sums, and the next batch to train on.
        """
        args = state, sums, self.train_split, order, self.root_key, jnp.int32(first)
        program = self._jitted.train_steps
        (state, sums), done = self._call("train_s", program, *args, most=end - first)
        return state, sums, first + done

    def locate_nan(self, state: steps.TrainState, order: jax.Array, bad_step: int) -> None:
        """Runs update `bad_step` of the run operation by operation.

        Args:
            state: from before it, in the same epoch.
            order: the epoch's.
            bad_step: counted from 1.

        Raises:
            FloatingPointError: an operation made a NaN; the traceback shows which.
        """
        first = int(state.step) % self.steps_per_epoch
        while (behind := bad_step - 1 - int(state.step)) > 0:
            state, _, first = self.train(state, MetricSums.zeros(), order, first, first + behind)
        with jax.disable_jit(), jax.debug_nans(True):
            batch = steps.take_batch(
                self.train_split, order, jnp.int32(first), batch_size=self.batch_size
            )
            self._train_step(state, batch, self.root_key)

    def evaluate(self, params: Any) -> Iterator[MetricSums]:
        """The metrics of the test images, call by call; the last are those of all."""
        sums, first = MetricSums.zeros(), 0
        end = steps.num_batches(self.test_size, EVAL_BATCH_SIZE)
        while first < end:
            args = params, sums, self.test_split, jnp.int32(first)
            sums, done = self._call("eval_s", self._jitted.eval_steps, *args, most=end - first)
            first += done
            yield sums

    def _call(self, name: str, program: Any, *args, most: int) -> tuple[Any, int]:
        """Runs `program` for as many steps as suit one call, at most `most`.

        Returns:
            Its result, finished, and how many steps it ran. The time is added to `name`.
        """
        count = most
        if isinstance(self.steps_per_call, int):
            count = min(most, self.steps_per_call)
        elif self.any_length:
            count = min(most, self._calibrated.get(program, CALIBRATION_STEPS))
        compiled = self._compile(program, *args, steps=count)
        length = (jnp.int32(count),) if self.any_length else ()
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*args, *length))  # here the host waits
        elapsed_s = time.perf_counter() - started
        self.seconds[name] += elapsed_s
        self._calibrated[program] = max(1, round(count * CALL_S / max(elapsed_s, 1e-9)))
        return result, count

    def _compile(self, program: Any, *args, steps: int | None = None) -> Any:
        """`program` compiled for these arguments: once, or once for each static number of steps."""
        key = (program, None if self.any_length else steps)
        if key not in self._compiled:
            started = time.perf_counter()
            length = () if steps is None else (jnp.int32(steps) if self.any_length else steps,)
            self._compiled[key] = program.lower(*args, *length).compile(self._compiler_options)
            self.seconds["compile_s"] += time.perf_counter() - started
        return self._compiled[key]
