"""This project: the programs of `compiled_steps.make_steps`, called as `Trainer` calls them."""

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import launch
from benchmarks.workers import job as jobs
from benchmarks.workers import trace
from mnist_jax import compiler, steps
from mnist_jax.compiled_steps import EVAL_BATCH_SIZE, Steps, dynamic_loop_bound, make_steps
from mnist_jax.config import Config
from mnist_jax.data import Split
from mnist_jax.data.batches import num_batches
from mnist_jax.errors import UsageError, is_out_of_memory
from mnist_jax.metrics import Metrics
from mnist_jax.models import layers, make_model
from mnist_jax.ops import malloc
from mnist_jax.optimizer import make_optimizer
from mnist_jax.parallel import mesh as meshes

STEPS_PER_CALL = 600  # where the length of a loop is part of the program
CACHE_HIT = "/jax/compilation_cache/cache_hits"
EVENTS: list[str] = []  # of JAX in this process
jax.monitoring.register_event_listener(lambda event, **_: EVENTS.append(event))


def config_of(job: jobs.Job) -> Config:
    """The preset tutorial with the job's model, batch size and precision. Loads its fork."""
    names = ("model", "batch_size", "precision", "seeds", "fork", "options", "dataset")
    return Config(**{name: getattr(job, name) for name in names}).resolve()


def model_of(job: jobs.Job) -> nn.Module:
    """The job's network, computing in its precision."""
    dtype = compiler.COMPUTE_DTYPE[job.precision]
    sizes: Any = {"image_shape": tuple(job.image_shape), "num_classes": job.num_classes}
    return make_model(job.model, dtype=dtype, **sizes, **config_of(job).arguments("model"))


def programs_of(
    job: jobs.Job, mesh: jax.sharding.Mesh, platform: str | None = None
) -> tuple[dict[str, Any], Steps]:
    """Model, tx and step_config of the package's own training, and its programs."""
    if platform is None:  # refuses a precision that the device does not have
        compiler.check_precision(job.precision, mesh.devices.flat[0])
    config, model = config_of(job), model_of(job)
    make_tx = partial(make_optimizer, **config.optimizer_arguments(), steps=1)
    how: dict[str, Any] = {"model": model, "step_config": steps.make_step_config(config)}
    sizes: dict[str, Any] = {"train_size": job.train_size, "batch_size": job.batch_size}
    programs = make_steps(mesh=mesh, make_tx=make_tx, **how, **sizes, platform=platform)
    return {**how, "tx": make_tx()}, programs


def compile_steps(
    program: Any, device: jax.Device, *args: Any, one_graph: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The compiled program, and its memory and time of compilation."""
    hits, started = EVENTS.count(CACHE_HIT), time.perf_counter()
    options = compiler.compiler_options(device, one_graph=one_graph)
    compiled = program.lower(*args).compile(options)
    compile_s = time.perf_counter() - started
    if device.platform == "gpu" and one_graph:  # a library may refuse, as in `Trainer`
        arrays = [x for x in args[1:] if not isinstance(x, int)]
        try:
            jax.block_until_ready(compiled(jax.tree.map(jnp.copy, args[0]), *arrays))
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                raise
            return compile_steps(program, device, *args, one_graph=False)
    malloc.trim()
    found = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    size = sizes - found.alias_size_in_bytes  # a donated argument counts once
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.platform == "cpu" and size > room:  # the system would end the process
        raise MemoryError(f"the program needs {size / 1e9:.1f} GB; choose a smaller --batch_size")
    memory = {"temporaries_bytes": found.temp_size_in_bytes, "program_bytes": size}
    cached = "from the cache" if EVENTS.count(CACHE_HIT) > hits else "afresh"
    graph = {"one_graph": one_graph} if device.platform == "gpu" else {}
    return compiled, memory | graph | {"compile_s": compile_s, "compiled": cached}


def make(job: jobs.Job, data: jobs.Data, dump: Path | None = None) -> jobs.Workload:
    """Training in the mode MANY, ONE or HOST, and evaluation; XLA writes its thunks to `dump`."""
    jax.config.update("jax_default_matmul_precision", compiler.MATMUL_PRECISION[job.precision])
    first = meshes.select_device(job.platform)
    mesh = meshes.make_mesh(meshes.select_devices(first, job.devices), job.seeds)
    device, dynamic = mesh.devices.flat[0], dynamic_loop_bound(first.platform)
    how, programs = programs_of(job, mesh)
    put = partial(meshes.put, sharding=meshes.replicated(mesh))
    keys, order = jax.random.key(0), data.order
    if job.seeds is not None:
        keys = jax.vmap(jax.random.key)(np.arange(job.seeds))
        order = np.stack([np.roll(order, i) for i in range(job.seeds)])
    keys = jax.random.wrap_key_data(put(jax.random.key_data(keys)))
    split, test = put((Split(data.image, data.label), Split(data.test_image, data.test_label)))
    order, metrics = put((order, Metrics.zeros(job.seeds)))
    if not (epoch := job.train_size // job.batch_size):
        raise UsageError(f"batch_size is {job.batch_size}; allowed is 1 to {job.train_size}")
    firsts = put([np.int32(i) for i in range(min(epoch, 1000))])  # no copy inside the clock
    longest = epoch if dynamic else min(epoch, STEPS_PER_CALL)
    # Of ten steps a tenth can be done twice, of fewer none.
    unit = longest if job.mode == jobs.MANY and not dynamic else 10 if job.slow_down else 1
    # Several calls in flight at once block each other on the devices of one CPU.
    settle = jax.block_until_ready if mesh.size > 1 and dynamic else (lambda x: x)
    state = programs.init_state(keys, {}, None, None)
    trees = {"params_bytes": state.params, "optimizer_bytes": state.opt_state}
    details = {name: sum(x.nbytes for x in jax.tree.leaves(trees[name])) for name in trees}

    slow = 1 + job.slow_down
    done = 0  # batches so far: a sample goes on in the epoch where the last one ended
    args = state, metrics, split, order, keys, firsts[0]
    program: Any = None
    length = put(np.int32(1)) if dynamic else round(slow * unit) if job.mode == jobs.MANY else 1
    if job.mode != jobs.HOST and "train" in job.what:
        program, found = compile_steps(programs.train_steps, device, *args, length)
        details |= found

    def many(state: Any, count: int) -> Any:
        nonlocal done
        end = done + count
        while done < end:
            first = done % epoch
            size = min(end - done, epoch - first) if dynamic else longest
            first = min(first, epoch - size)
            turns = [put(np.int32(round(slow * size)))] if dynamic else []
            place = order, keys, firsts[first % len(firsts)]
            state, *_ = settle(program(state, metrics, split, *place, *turns))
            done += size
        return state

    def one(state: Any, count: int) -> Any:
        nonlocal done
        sums = metrics
        for i in range(done, done + round(slow * count)):
            place = order, keys, firsts[i % epoch % len(firsts)]
            state, sums, _ = settle(program(state, sums, split, *place, *[length] * dynamic))
        done += count
        return state

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler.compiler_options(device))
    def step(state: Any, batch: Any, root_key: Any) -> Any:
        return steps.train_step(state, batch, steps.step_keys(root_key, state.step), **how)[0]

    def host(state: Any, count: int) -> Any:
        nonlocal done
        mask = np.ones(job.batch_size, bool)
        for i in range(done, done + round(slow * count)):
            index = data.batch_index(i, job.batch_size)
            batch = {"image": data.image[index], "label": data.label[index], "mask": mask}
            state = step(state, jax.device_put(batch, device), keys)
        done += count
        return state

    batches = num_batches(job.test_size, EVAL_BATCH_SIZE)
    fixed = metrics, test, firsts[0], put(np.int32(batches)) if dynamic else batches
    compiled: dict[str, Any] = {}

    def evaluate(state: Any) -> Any:
        args = state.params, state.model_state, *fixed
        if not compiled:  # in the first call, which is not timed
            compiled["eval"] = compile_steps(programs.eval_steps, device, *args)[0]
        return settle(compiled["eval"](*args[: 5 + dynamic]))

    def traced(state: Any) -> dict[str, Any]:
        nonlocal program
        if first.platform == "gpu":  # a kernel in a graph does not say which operation it is of
            lowered = programs.train_steps.lower(state, *args[1:], length)
            program = lowered.compile({compiler.COMMAND_BUFFER: ""})
        names = trace.layers_of(program.as_text(), [layer.name for layer in layers(how["model"])])
        return trace.of_steps(many, state, trace.STEPS_ON_CPU if dynamic else unit, names, dump)

    own = {"train": {jobs.MANY: many, jobs.ONE: one, jobs.HOST: host}[job.mode], "trace": traced}
    own |= {"sync": jax.block_until_ready, "evaluate": evaluate}
    return jobs.Workload(state=state, unit=unit, details=details, **own)


def run(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Does the jobs; says of a GPU in which state it was then."""
    platform, dump = cases[0]["platform"], None
    with tempfile.TemporaryDirectory() as folder:
        if platform != "cpu" and any(job["trace"] for job in cases):
            dump = Path(folder)
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {trace.DUMP.format(dump)}"
            jax.config.update("jax_enable_compilation_cache", False)  # it would write no list
        found = jobs.run_all(cases, partial(make, dump=dump))
    if platform == "gpu":
        found["context"]["gpu"] = launch.gpu_state()
    return found
