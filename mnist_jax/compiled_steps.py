"""Trainer: the step functions compiled for a mesh, with the data on its devices, and timed."""

import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mnist_jax import gpu_loop, steps
from mnist_jax.compiler import compiler_options
from mnist_jax.config import Config
from mnist_jax.data import Dataset
from mnist_jax.data.batches import num_batches
from mnist_jax.errors import first_line, is_out_of_memory, running
from mnist_jax.metrics import Metrics
from mnist_jax.models import check_storable, count_parameters, variable_shapes
from mnist_jax.ops import malloc
from mnist_jax.optimizer import ema_params, make_optimizer
from mnist_jax.parallel import distributed
from mnist_jax.parallel.ensemble import over_members
from mnist_jax.parallel.mesh import put, replicated, sharded, to_host

# Images per batch in evaluation. Fixed, so that every run rounds its sums the same way; small
# enough for each activation of the CNN to stay under 60 MB.
EVAL_BATCH_SIZE = 250
CALL_S = 1.0  # target duration of a call on a CPU, for a moving progress bar and a quick Ctrl-C
CALIBRATION_STEPS = 2
# The arguments of the functions of `steps` that are stacked by member; members share the others.
STACKED = ("root_key", "hyperparams", "params", "model_state", "state", "metrics", "order")


def dynamic_loop_bound(platform: str) -> bool:
    """Whether the number of steps is an argument of the program; see `steps.train_steps`."""
    return platform == "cpu"


def uses_gpu_loop(platform: str) -> bool:
    """Whether training runs `gpu_loop.train_steps` in place of `steps.train_steps`."""
    return platform == "gpu"


class Steps(NamedTuple):
    """The functions of `steps` under `jax.jit`, with model, optimizer and sizes bound.

    The last argument of `train_steps` and `eval_steps`, the number of steps, is an int32 array if
    `dynamic_loop_bound`, otherwise a Python int. `train_steps` donates the state.
    """

    init_state: Any  # (root_key, hyperparams, params, model_state) → TrainState
    epoch_permutation: Any  # (root_key, epoch) → (train_size,) int32
    train_steps: Any  # as `steps.train_steps`
    eval_steps: Any  # as `steps.eval_steps`


def make_steps(
    model: nn.Module,
    make_tx: Callable[..., optax.GradientTransformation],
    mesh: Mesh,
    *,
    train_size: int,
    batch_size: int,
    step_config: steps.StepConfig,
    log_size: int = 0,
    platform: str | None = None,
) -> Steps:
    """The compiled functions of a run; each compiles when it is first called.

    Args:
        make_tx: makes the run's optimizer, or one with other hyperparameters.
        mesh: from `mesh.make_mesh`; its axis is "members" where arguments in `STACKED` are stacked.
        train_size, batch_size: numbers of training images, in the split and per step.
        log_size: steps of a call whose values are returned; see `steps.train_steps`.
        platform: cpu, gpu or tpu, that the functions are lowered for; None for that of the mesh.
    """
    where = platform or mesh.devices.flat[0].platform
    members = "members" in mesh.axis_names
    # On a CPU a step of the MLP already fills the cores: `vmap` gains nothing and costs cache
    # misses, and convolutions with a kernel each are slow. A step of logistic regression is too
    # small to fill them.
    shapes = jax.tree.leaves(variable_shapes(model)[0])
    is_large = count_parameters(shapes) > 100_000 or any(x.ndim > 3 for x in shapes)
    sequential = members and where == "cpu" and is_large

    def jit(function: Any, **options: Any) -> Any:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if "steps" in names and not dynamic_loop_bound(where):
            options["static_argnums"] = names.index("steps")
        if not members:
            return jax.jit(function, out_shardings=replicated(mesh), **options)
        is_stacked = [name in STACKED for name in names]
        return jax.jit(over_members(function, is_stacked, mesh, sequential=sequential), **options)

    loop = gpu_loop if uses_gpu_loop(where) else steps
    how, tx = {"model": model, "step_config": step_config}, make_tx()

    def init_state(root_key: Any, hyperparams: Any, params: Any, model_state: Any) -> Any:
        own_tx = make_tx(**hyperparams) if hyperparams else tx
        return steps.init_state(root_key, params, model_state, **how, tx=own_tx)

    batches = {**how, "sharding": None if members else sharded(mesh)}
    train = {**batches, "tx": tx, "batch_size": batch_size, "log_size": log_size}
    # `init_state` runs once, and takes longer to optimize than to run.
    quick = {"xla_backend_optimization_level": 1} if where == "cpu" else None
    return Steps(
        jit(init_state, compiler_options=quick),
        jit(partial(steps.epoch_permutation, size=train_size)),
        jit(partial(loop.train_steps, **train), donate_argnums=0),
        jit(partial(steps.eval_steps, **batches, batch_size=EVAL_BATCH_SIZE)),
    )


class Trainer:
    """The compiled programs of a run, and its data on the devices.

    With JAX_DISABLE_JIT or JAX_DEBUG_NANS nothing is compiled ahead of time, so that JAX can step
    through the functions.

    Attributes:
        seconds: compile_s, train_s and eval_s so far, each of finished work.
        warnings: what the programs could not do.
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, config: Config, mesh: Mesh, *, log: bool = False
    ):
        assert config.batch_size is not None and config.epochs is not None, "config is resolved"
        device = mesh.devices.flat[0]
        self.config = config
        self.seconds = {"compile_s": 0.0, "train_s": 0.0, "eval_s": 0.0}
        self.dynamic = dynamic_loop_bound(device.platform)
        train_size = len(dataset.train.label)
        self.steps_per_epoch = num_batches(train_size, config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self._members = config.num_members
        self._per_run = replicated(mesh)  # the sharding of what the members share
        self._per_member = replicated(mesh) if self._members is None else sharded(mesh)
        # As `jax.random.key` makes them, whatever JAX_RANDOM_SEED_OFFSET is; (members, 2).
        key_data = np.array([(0, member["seed"]) for member in config.members()], np.uint32)
        key_data = put(key_data[0] if self._members is None else key_data, self._per_member)
        self.keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        splits = {"validation": dataset.validation, "test": dataset.test}
        splits = {name: split for name, split in splits.items() if split is not None}
        # The images and labels on the devices, as uint8; they are transferred once.
        self.train_split, placed = put((dataset.train, splits), self._per_run)
        self.eval_splits = {name: placed[name] for name in splits}  # `put` sorts the names
        self._steps = make_steps(
            model,
            partial(make_optimizer, **config.optimizer_arguments(), steps=self.total_steps),
            mesh,
            train_size=train_size,
            batch_size=config.batch_size,
            step_config=steps.make_step_config(config),
            log_size=self.steps_per_epoch if log else 0,
        )
        self._options = partial(compiler_options, device, deterministic=config.deterministic)
        self._one_graph = self._options() != self._options(one_graph=False)
        self.warnings: list[str] = []
        self._compiled: dict[Any, Any] = {}
        self._steps_per_call: dict[Any, int] = {}  # by program, from the time of its last call

    def init(self, params: Any = None, model_state: Any = None) -> steps.TrainState:
        """The initial state; from these NumPy arrays, stacked by member, if they are given."""
        args = self.keys, *put((self._grid(), params, model_state), self._per_member)
        return self._compile(self._steps.init_state, *args)(*args)

    def state_shapes(self) -> steps.TrainState:
        """Shapes and dtypes of the state; computes nothing."""
        return jax.eval_shape(self._steps.init_state, self.keys, self._grid(), None, None)

    def check_step(self) -> None:
        """Traces a training step; UsageError: the fork, its options or the optimizer fail in it."""
        fork, options = self.config.fork, self.config.options
        with running(f"the optimizer {self.config.optimizer!r}"):
            state = self.state_shapes()
        check_storable(state.opt_state, f"the state of the optimizer {self.config.optimizer!r}")
        if not (fork or options) or jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return
        with running(f"a step with {f'the fork {fork}' if fork else ' '.join(options)}"):
            order = jax.eval_shape(self._steps.epoch_permutation, self.keys, 0)
            args = state, Metrics.zeros(self._members), self.train_split, order
            self._steps.train_steps.trace(*args, self.keys, 0, 1)

    def _grid(self) -> dict[str, np.ndarray]:
        """The hyperparameters that differ between members, (members,) float32 each."""
        members = self.config.members()
        values = {n: np.array([m[n] for m in members], np.float32) for n in self.config.grid}
        # A weight decay of 0 alone is not in the optimizer's state.
        return {name: array for name, array in values.items() if array.any()}

    def put_state(self, state: steps.TrainState) -> steps.TrainState:
        """A state of NumPy arrays, on the devices."""
        return put(state, self._per_member)

    def eval_params(self, state: steps.TrainState) -> Any:
        """The parameters that are evaluated: their EMA if the run keeps one."""
        decay = self.config.ema_decay
        return ema_params(state.ema, state.step, decay) if decay else state.params

    def permutation(self, epoch: int) -> jax.Array:
        """The order of an epoch's training images; epochs count from 0."""
        args = self.keys, put(np.int32(epoch), self._per_run)
        return self._compile(self._steps.epoch_permutation, *args)(*args)

    def train(
        self, state: steps.TrainState, metrics: Metrics, order: jax.Array, first: int, end: int
    ) -> tuple[steps.TrainState, Metrics, int, dict[str, np.ndarray]]:
        """One call of `steps.train_steps`, from batch `first` of the epoch to `end` at most.

        Returns the new state (the old one is donated), the epoch's metrics so far as NumPy arrays,
        the next batch, and the log: values (steps,) or (members, steps), if there is one.
        """
        args = state, put(metrics, self._per_member), self.train_split, order, self.keys
        program = self._steps.train_steps
        (state, metrics, log), done = self._call("train_s", program, args, first, end - first)
        log = {name: values[..., :done] for name, values in to_host(log).items()}
        return state, to_host(metrics), first + done, log

    def evaluate(self, state: steps.TrainState, name: str) -> Iterator[Metrics]:
        """The metrics of a split ("test" or "validation") after each call, as NumPy arrays."""
        metrics, first, split = Metrics.zeros(self._members), 0, self.eval_splits[name]
        params = self.eval_params(state)
        end = num_batches(len(split.label), EVAL_BATCH_SIZE)
        while first < end:
            args = params, state.model_state, put(metrics, self._per_member), split
            program = self._steps.eval_steps
            result, done = self._call("eval_s", program, args, first, end - first)
            metrics = to_host(result)
            first += done
            yield metrics

    def _call(self, name: str, program: Any, args: tuple, first: int, most: int) -> tuple[Any, int]:
        """Runs `program` for at most `most` steps; returns its finished result and their number.

        The time is added to `seconds[name]`.
        """
        count = most
        if isinstance(self.config.steps_per_call, int):
            count = min(count, self.config.steps_per_call)
        elif self.dynamic:
            count = min(count, self._steps_per_call.get(program, CALIBRATION_STEPS))
        count = distributed.broadcast(count)  # measured times differ between processes
        length = put(np.int32(count), self._per_run) if self.dynamic else count
        result, elapsed_s = self._run(program, *args, put(np.int32(first), self._per_run), length)
        self.seconds[name] += elapsed_s
        self._steps_per_call[program] = max(1, round(count * CALL_S / max(elapsed_s, 1e-9)))
        return result, count

    def _run(self, program: Any, *args: Any) -> tuple[Any, float]:
        """The finished result of `program`, and the seconds it took without compilation."""
        # In the first call a library may refuse to be part of a CUDA graph. By then the program
        # may have consumed its first argument: a copy is kept for the second try.
        is_first = program not in self._steps_per_call
        may_fail = self._one_graph and is_first and jax.process_count() == 1
        spare = (jax.tree.map(jnp.copy, args[0]), *args[1:]) if may_fail else ()
        try:
            compiled = self._compile(program, *args, one_graph=self._one_graph)
            if compiled is not program:  # a static number of steps is part of it
                args = tuple(arg for arg in args if not isinstance(arg, int))
            started = time.perf_counter()
            result = jax.block_until_ready(compiled(*args))  # the host waits here
        except jax.errors.JaxRuntimeError as error:
            if not may_fail or is_out_of_memory(error):
                raise
            problem = f"a step is several CUDA graphs, not one ({first_line(error)})"
            self.warnings.append(problem)
            self._one_graph = False
            return self._run(program, *spare)
        return result, time.perf_counter() - started

    def _compile(self, program: Any, *args: Any, one_graph: bool = False) -> Any:
        """`program` compiled for arguments of these types and shardings, and static values."""
        if jax.config.jax_disable_jit or jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue]
            return program
        leaves = jax.tree.leaves(args)
        key = (
            program,
            one_graph,
            *((x.shape, x.dtype, x.sharding) if isinstance(x, jax.Array) else x for x in leaves),
        )
        if key not in self._compiled:
            started = time.perf_counter()
            self._compiled[key] = program.lower(*args).compile(self._options(one_graph=one_graph))
            malloc.trim()
            self.seconds["compile_s"] += time.perf_counter() - started
        return self._compiled[key]
