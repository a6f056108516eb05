"""The loop for a GPU: the same results as the plain loop, and what it compiles to for an H100."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from shared import python
from small import make_split

from mnist_jax import compiled_steps, fit, gpu_loop, models, steps
from mnist_jax.losses import cross_entropy
from mnist_jax.metrics import NEVER, Metrics

SIZE, BATCH_SIZE = 22, 8  # an epoch has batches of 8, 8 and 6
H100 = Path(__file__).with_name("h100.txtpb")


class Normed(models.LogisticRegression):
    """With batch statistics, dropout, a loss of its own, and parameters cast once, twice or not."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(not train, momentum=0.5)(x.reshape(len(x), -1))
        hidden = nn.Dense(784, dtype=self.dtype, name="shared")
        x = nn.Dropout(0.5, deterministic=not train)(hidden(hidden(x)))
        x = nn.Dense(16, dtype=self.dtype, name="once")(x)
        x = nn.Dense(10, dtype=jnp.float32, name="float32")(x)
        scale = self.param("scale", nn.initializers.zeros, (3, 5))
        self.sow("losses", "scale", jnp.sum(jnp.sqrt(scale + 1)))
        return x


MODELS = {
    "mlp": models.MLP(hidden_sizes=(8,)),
    "bfloat16": models.MLP(hidden_sizes=(8,), dtype=jnp.bfloat16),
    "normed": Normed(dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_it_trains_as_the_plain_loop_does(exact):
    model, step_config, tx = MODELS["normed"], steps.StepConfig(ema_decay=0.9), optax.adam(1e-3)
    how: dict[str, Any] = {"model": model, "tx": tx, "step_config": step_config}
    root, split = jax.random.key(1), make_split(SIZE, seed=0)
    order = steps.epoch_permutation(root, 0, size=SIZE)
    start = jax.jit(partial(steps.init_state, **how))(root), Metrics.zeros()
    found = []
    for loop in (steps.train_steps, gpu_loop.train_steps):
        train = jax.jit(partial(loop, **how, batch_size=BATCH_SIZE, log_size=3), static_argnums=6)
        carry, logs = start, []
        for first, count in ((0, 2), (2, 1)) if exact else ((0, 3),):
            with jax.disable_jit(exact):  # one after another all operations round alike
                *carry, log = train(*carry, split, order, root, first, count)
            logs.append({name: values[:count] for name, values in log.items()})
        found.append((carry, logs))
    close = partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal if exact else close, *found)
    assert found[1][0][1].count == SIZE and found[1][0][0].step == 3


def test_only_parameters_that_the_model_casts_once_and_at_once_are_kept_cast():
    for name, cast in (("bfloat16", 2), ("normed", 1), ("mlp", 0)):
        model = MODELS[name]
        dtypes = gpu_loop.cast_dtypes(model, *models.variable_shapes(model))
        assert jax.tree.leaves(dtypes) == [jnp.bfloat16] * cast
        cast_params = partial(gpu_loop.cast_params, dtypes=dtypes)
        copies = jax.eval_shape(cast_params, models.variable_shapes(model)[0])
        assert [leaf.dtype for leaf in jax.tree.leaves(copies)] == [jnp.bfloat16] * cast


class Steep(models.LogisticRegression):
    """Its loss is finite, and its gradient infinite, once a parameter is down at 0."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(2.0), (70, 70))
        self.sow("losses", "slope", jnp.sqrt(slope[3, 5]) + jnp.sum(slope) - slope[3, 5])
        return nn.Dense(10, name="logits")(x.reshape(len(x), -1))


def test_an_infinite_gradient_of_a_finite_loss_is_noticed_at_its_step():
    model, root = Steep(), jax.random.key(0)
    down = optax.stateless(lambda grads, _: jax.tree.map(lambda g: -jnp.ones_like(g), grads))
    how: dict[str, Any] = {"model": model, "tx": down, "step_config": steps.StepConfig()}
    split = make_split(SIZE, seed=0)
    start = jax.jit(partial(steps.init_state, **how))(root), Metrics.zeros()
    for count, expected in ((2, NEVER), (3, 3), (4, 3)):
        program = jax.jit(partial(gpu_loop.train_steps, **how, batch_size=4), static_argnums=6)
        _, metrics, _ = program(*start, split, np.arange(SIZE), root, 0, count)
        assert metrics.first_nonfinite == expected


@pytest.mark.parametrize(
    ("fields", "calls", "others"),
    [
        ({"steps_per_call": 4}, [4, 4, 4, 3], ["gpu", "tpu"]),
        ({"steps_per_call": 15, "seeds": 2}, [15], ["gpu"]),
        ({"steps_per_call": 15, "precision": "bfloat16"}, [15], ["gpu"]),
    ],
)
def test_a_run_of_static_loops_is_as_on_a_cpu(fields, calls, others, config, monkeypatch, tmp_path):
    """With this loop as on a GPU, or without as on a TPU."""
    given, found = {"model": "mlp", "hidden_sizes": (8,), "epochs": 1, **fields}, []
    for name in ("cpu", *others):
        for choice, where in (("uses_gpu_loop", "gpu"), ("dynamic_loop_bound", "cpu")):
            monkeypatch.setattr(compiled_steps, choice, mock.Mock(return_value=name == where))
        watch = mock.Mock()
        result = fit(config(**given, workdir=tmp_path / name), callbacks=[watch])
        norms = [call.args[1]["grad_norm"] for call in watch.on_steps.call_args_list]
        assert [part.shape[-1] for part in norms] == calls
        found.append((result.params, norms))
    close = partial(np.testing.assert_allclose, rtol=2e-2, atol=1e-3)
    for other in found[1:]:
        jax.tree.map(close, found[0], other)


def test_the_loss_for_accelerators_equals_optaxs():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(0, 30, (40, 10)).astype(np.float32), rng.integers(0, 10, 40)
    ours = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, {"label": label}).mean()))
    checks = [export.DisabledSafetyCheck.platform()]
    for_gpu = export.export(ours, platforms=["cuda"], disabled_checks=checks)(logits)
    assert "scatter" not in for_gpu.mlir_module()
    optaxs = optax.softmax_cross_entropy_with_integer_labels
    theirs = jax.value_and_grad(lambda x: optaxs(x, label).mean())
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, for_gpu.call(logits), theirs(logits))


COMPILE = """
import sys, jax, numpy as np
from functools import partial
from jax.experimental import topologies
from benchmarks.workers import job as jobs, ours
from mnist_jax import compiler, steps
from mnist_jax.data.dataset import Split
from mnist_jax.metrics import Metrics
from mnist_jax.parallel import mesh as meshes

name, precision, seeds, target = sys.argv[1:]
target = {"platform": "cuda", "target_config": open(target).read(), "topology": "1x1x1"}
device = topologies.get_topology_desc(**target).devices[0]
job = jobs.Job(model=name, precision=precision, seeds=int(seeds) or None)
mesh = meshes.make_mesh([device], job.seeds)
how, programs = ours.programs_of(job, mesh)
own = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    (job.seeds, *x.shape) if job.seeds else x.shape, x.dtype), tree)
key = jax.eval_shape(lambda: jax.random.key(0))
state = own(jax.eval_shape(partial(steps.init_state, **how), key))
split = Split(np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32))
args = state, Metrics.zeros(job.seeds), split, own(split.label), own(key), np.int32(0)
place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.replicated(mesh))
with jax.default_matmul_precision(compiler.MATMUL_PRECISION[precision]):
    lowered = programs.train_steps.lower(*jax.tree.map(place, args), 600)
    lowered.compile(compiler.compiler_options(device))
"""


@pytest.mark.skipif(not find_spec("jax_cuda13_plugin"), reason="needs the extra cuda13")
@pytest.mark.parametrize(
    ("model", "precision", "seeds", "most"),
    [
        ("cnn", "bfloat16", 0, 64),
        ("cnn", "float32", 0, 60),
        ("cnn", "tf32", 0, 60),
        ("cnn", "bfloat16", 16, 220),
        ("mlp", "float32", 0, 45),
        ("logistic", "float32", 0, 16),
    ],
)
def test_compiled_for_an_absent_h100_a_step_is_one_graph_of_few_kernels(
    model, precision, seeds, most, tmp_path
):
    dump = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=.*(train_steps|call).*"
    switches = {"XLA_FLAGS": dump, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    python("-c", COMPILE, model, precision, seeds, H100, **switches)
    [dump] = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    [body] = re.findall(r"(?m)^  body:\n((?: {4}.*\n)+)", dump.read_text())
    started = re.findall(r"(?m)^ {4}\d+: (k\w+)", body)  # by the host
    inside = re.findall(r"(?m)^ {8}\d+: k\w+", body)  # of graphs
    assert started == ["kCommandBuffer"] and len(inside) <= most
