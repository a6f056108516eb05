"""A run's compiled programs, with the time to compile them kept apart from the time they take."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mnist_jax import steps
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.errors import DeviceError
from mnist_jax.metrics import Metrics
from mnist_jax.models import count_parameters, param_shapes
from mnist_jax.ops import malloc as memory
from mnist_jax.optimizer import ema_params, step_config
from mnist_jax.parallel import mesh as devices
from mnist_jax.parallel.ensemble import member_of, over_devices, over_members
from mnist_jax.parallel.mesh import Layout
from mnist_jax.parallel.team import Team
from mnist_jax.reporting.profiling import Call, Window, profiled
from mnist_jax.runs.checkpoint import tree_bytes

# Images a batch when evaluating. Fixed, so that sums are rounded the same way in every run; small
# enough for each of the CNN's activations to stay under 60 MB.
EVAL_BATCH_SIZE = 250
CALL_S = 1.0  # what one call aims to last on a CPU, so that progress shows and Ctrl-C is heard
CALIBRATION_STEPS = 2
PROFILED_STEPS = 50  # at most, on a CPU: a trace of a second's worth would be too large to read


def dynamic_loop_bound(device: jax.Device) -> bool:
    """Whether a loop's length is an argument of the program there, and not a part of it."""
    return device.platform == "cpu"


class Steps(NamedTuple):
    """The functions of `steps` that a run compiles, with model, optimizer and sizes filled in.

    `train_steps` donates its state, unless told not to; `eval_steps` takes the state, too. Their
    last argument, the number of steps, is an int32 array where a loop takes any length, and
    otherwise a Python int.
    """

    init_state: Any
    epoch_permutation: Any
    train_steps: Any
    eval_steps: Any


def make_steps(
    model: nn.Module,
    tx: optax.GradientTransformation,
    device: jax.Device,
    *,
    train_size: int,
    batch_size: int,
    recipe: steps.StepConfig,
    average: float = 0.0,
    members: bool = False,
    layout: Layout | None = None,
    donate: bool = True,
) -> Steps:
    """The programs of a run on `device`, compiled when they are first called.

    Args:
        model: the network.
        tx: the optimizer.
        device: where they run; of several, one.
        train_size: training images.
        batch_size: images a step.
        recipe: what a step does besides.
        average: the decay of the average of parameters that `tx` keeps, if it does.
        members: whether states, sums, orders and keys are those of an ensemble.
        layout: how arrays lie on the devices, if there are several.
        donate: whether `train_steps` may overwrite the state it is given.
    """
    init_state = partial(steps.init_state, model=model, tx=tx)
    epoch_permutation = partial(steps.epoch_permutation, size=train_size)
    mesh = None if layout is None else layout.mesh
    in_parallel: dict[str, Any] = {}
    lying: dict[str, Any] = {}
    if layout is not None and mesh is not None and not members:
        in_parallel, lying = {"spread": layout.spread}, {"out_shardings": layout.whole}
    how = {"model": model, "recipe": recipe, **in_parallel}
    train_steps = partial(steps.train_steps, tx=tx, batch_size=batch_size, **how)

    def eval_steps(state, sums, split, first, steps_):
        params = ema_params(state.params, state.opt_state, average)
        return steps.eval_steps(
            params, sums, split, first, steps_, batch_size=EVAL_BATCH_SIZE, **how
        )

    any_length = dynamic_loop_bound(device)
    if members:
        one_by_one = members_take_turns(model, device)

        def each(function, per_member):
            function = over_members(function, per_member, one_by_one=one_by_one)
            return function if mesh is None else over_devices(function, per_member, mesh)

        init_state, epoch_permutation = (
            each(init_state, [True]),
            each(epoch_permutation, [True, False]),
        )
        train_steps = each(train_steps, [True, True, False, True, True, False, False])
        eval_steps = each(eval_steps, [True, True, False, False, False])
    return Steps(
        jax.jit(init_state, compiler_options=devices.quick_to_compile(device), **lying),
        jax.jit(epoch_permutation, **lying),
        jax.jit(
            train_steps,
            static_argnums=() if any_length else 6,
            donate_argnums=0 if donate else (),
            **lying,
        ),
        jax.jit(eval_steps, static_argnums=() if any_length else 4, **lying),
    )


def members_take_turns(model: nn.Module, device: jax.Device) -> bool:
    """Whether the members of an ensemble are better trained one after the other there.

    On a CPU, where a step of the MLP already fills the cores, stacking gains nothing and costs the
    cache; logistic regression's step is too small to.
    """
    return device.platform == "cpu" and count_parameters(param_shapes(model)) > 100_000


def check_memory(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    device: jax.Device,
    layout: Layout,
) -> None:
    """Refuses networks whose states and gradients alone are more than a device has room for.

    Raises:
        DeviceError: says how many members of an ensemble fit at most.
    """
    if (room := devices.memory_bytes(device)) is None:
        return
    params = param_shapes(model)
    state_bytes = tree_bytes((params, jax.eval_shape(tx.init, params)))
    on_cpu = device.platform == "cpu"
    each = state_bytes * (1 + on_cpu)  # there a checkpoint's copy lies in the same memory
    if config.seeds is None:
        if (needed := each + tree_bytes(params)) > room:
            raise DeviceError(
                f"the {config.model} needs at least {needed / 1e9:.1f} GB, and the memory has "
                f"{room / 1e9:.1f} GB; change --hidden_sizes"
            )
        return
    gradients = tree_bytes(params) * config.microbatches
    once = gradients if members_take_turns(model, device) else 0
    each += gradients - once
    # All devices of a CPU share its memory; of several processes each gets all that is saved.
    parts = 1 if on_cpu or jax.process_count() > 1 else len(layout.devices)
    if (needed := -(-config.seeds // parts) * each + once) > room:
        most = parts * max(0, (room - once) // each)
        raise DeviceError(
            f"seeds is {config.seeds}, which needs at least {needed / 1e9:.1f} GB; "
            f"at most {most} fit into the memory of {room / 1e9:.1f} GB"
            f"{f' of each of {parts} devices' * (parts > 1)}; change --seeds"
        )


class Trainer:
    """Everything of a run that is compiled, and the data it works on, on the devices.

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
        config: Config,
        layout: Layout,
        team: Team,
    ):
        device = layout.devices[0]
        self.layout = layout
        self._team = team
        self.seconds = {"compile_s": 0.0, "train_s": 0.0, "eval_s": 0.0}
        self.any_length = dynamic_loop_bound(device)
        self.steps_per_call = config.steps_per_call
        self._window = Window(config.profile if team.leads else None, config.profile_steps)
        self.train_size = len(dataset.train.label)
        self.batch_size, self.microbatches = config.batch_size, config.microbatches
        self.members = config.seeds
        make_key = partial(jax.random.key, impl="threefry2x32")
        if self.members is None:
            self.root_key = make_key(config.seed)
        else:
            self.root_key = jax.vmap(make_key)(np.array(config.all_seeds(), np.uint32))
        self._keys = self.root_key
        if layout.mesh is not None:
            data = layout.place_state(jax.random.key_data(self.root_key))
            self._keys = jax.random.wrap_key_data(data, impl="threefry2x32")
        # The one transfer of images: from here on they stay on the device, as uint8.
        self.train_split = layout.place(dataset.train)
        self.eval_splits = layout.place(dataset.eval_splits())
        recipe = step_config(config)
        self._jitted = make_steps(
            model,
            tx,
            device,
            train_size=self.train_size,
            batch_size=self.batch_size,
            recipe=recipe,
            average=config.ema_decay,
            members=self.members is not None,
            layout=layout,
            donate=not config.debug,  # so that a step can be run again
        )
        self._compiler_options = devices.compiler_options(
            device, deterministic=config.deterministic
        )
        self._train_step = partial(steps.train_step, model=model, tx=tx, recipe=recipe)
        self._compiled: dict[Any, Any] = {}
        self._calibrated: dict[Any, int] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch, the last and smaller batch included."""
        return steps.num_batches(self.train_size, self.batch_size)

    def init(self) -> steps.TrainState:
        """Fresh parameters and optimizer."""
        return self._compile(self._jitted.init_state, self._keys)(self._keys)

    def order(self, epoch: int) -> jax.Array:
        """The epoch's order of the training images; epochs count from 0."""
        args = self._keys, np.int32(epoch)
        compiled = self._compile(self._jitted.epoch_permutation, *args)
        return compiled(*args)  # its time is part of the next call's

    def train(
        self, state: steps.TrainState, sums: Metrics, order: jax.Array, first: int, end: int
    ) -> tuple[steps.TrainState, Metrics, int]:
        """One call of `steps.train_steps` from batch `first`, at most to batch `end`.

        Returns:
            The new state (the old one is donated), the sums as NumPy arrays, and the next batch to
            train on.
        """
        sums = jax.tree.map(self.layout.fill_up, sums)
        args = state, sums, self.train_split, order, self._keys, np.int32(first)
        program = self._jitted.train_steps
        call = self._window.call(state, end - first, first=program not in self._calibrated)
        (state, sums), done = self._call("train_s", program, *args, call=call)
        return state, self.layout.fetch(sums), first + done

    def locate_nan(
        self, state: steps.TrainState, order: jax.Array, first: int, bad_step: int, member: int
    ) -> None:
        """Runs an update operation by operation.

        Args:
            state: from before it, in the same epoch. Of an ensemble, all members'.
            order: the epoch's.
            first: the batch of the epoch that `state` has come to.
            bad_step: the update's number, counted from 1.
            member: of an ensemble, which of its members is looked at.

        Raises:
            FloatingPointError: an operation made a NaN; the traceback shows which.
        """
        while (behind := bad_step - 1 - steps.step_of(state)) > 0:
            sums = Metrics.zeros(self.members)
            state, _, first = self.train(state, sums, order, first, first + behind)
        split, one = self.train_split, (state, order, self.root_key)
        if self.layout.mesh is not None:  # all of it to one device of this process
            found = self.layout.fetch((state, order))
            split, (state, order) = jax.device_put((jax.device_get(split), found))
            one = state, order, self.root_key
        if self.members is not None:
            one = member_of(one, member)
        state, order, root_key = one
        with jax.disable_jit(), jax.debug_nans(True):
            batch = steps.take_batch(
                split,
                order,
                jnp.int32(first),
                batch_size=self.batch_size,
                microbatches=self.microbatches,
            )
            self._train_step(state, batch, root_key)

    def evaluate(self, state: steps.TrainState, name: str) -> Iterator[Metrics]:
        """The metrics of a split's images as NumPy arrays, call by call; the last are all images'.

        Args:
            state: whose parameters are evaluated, or their average.
            name: "test" or "validation".
        """
        sums, first, split = Metrics.zeros(self.members), 0, self.eval_splits[name]
        end = steps.num_batches(len(split.label), EVAL_BATCH_SIZE)
        while first < end:
            args = state, jax.tree.map(self.layout.fill_up, sums), split, np.int32(first)
            found, done = self._call(
                "eval_s", self._jitted.eval_steps, *args, call=Call(end - first)
            )
            sums = self.layout.fetch(found)
            first += done
            yield sums

    def _call(self, name: str, program: Any, *args, call: Call) -> tuple[Any, int]:
        """Runs `program` for as many of the steps asked for as suit one call.

        Returns:
            Its result, finished, and how many steps it ran. The time is added to `name`.
        """
        count = call.most
        if not call.exact:
            if isinstance(self.steps_per_call, int):
                count = min(count, self.steps_per_call)
            elif self.any_length:
                count = min(count, self._calibrated.get(program, CALIBRATION_STEPS))
            if call.folder is not None and self.any_length:
                count = min(count, PROFILED_STEPS)
        count = self._team.decide(count)
        compiled = self._compile(program, *args, steps=count)
        length = (np.int32(count),) if self.any_length else ()
        with contextlib.nullcontext() if call.folder is None else profiled(call.folder):
            started = time.perf_counter()
            result = jax.block_until_ready(compiled(*args, *length))  # here the host waits
            elapsed_s = time.perf_counter() - started
        self.seconds[name] += elapsed_s
        self._calibrated[program] = max(1, round(count * CALL_S / max(elapsed_s, 1e-9)))
        return result, count

    def _compile(self, program: Any, *args, steps: int | None = None) -> Any:
        """`program` compiled for arguments of these shapes, and for this static number of steps."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args))
        key = (program, None if self.any_length else steps, shapes)
        if key not in self._compiled:
            started = time.perf_counter()
            length = () if steps is None else (np.int32(steps) if self.any_length else steps,)
            self._compiled[key] = program.lower(*args, *length).compile(self._compiler_options)
            memory.trim()
            self.seconds["compile_s"] += time.perf_counter() - started
        return self._compiled[key]
