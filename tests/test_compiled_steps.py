"""The Trainer: how many steps a call takes, what it donates, and steps in several CUDA graphs."""

import itertools
from functools import partial
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from mnist_jax import MODELS, compiled_steps, fit, steps
from mnist_jax.compiled_steps import Trainer
from mnist_jax.parallel import mesh


def test_initial_parameters_have_the_same_bits_when_fully_optimized():
    """The initial state comes from a program that XLA optimizes less, to compile faster."""
    key, tx, model = jax.random.key(3), optax.adam(1e-3), MODELS["mlp"]()
    sizes = {"train_size": 1, "batch_size": 1, "step_config": steps.StepConfig()}
    devices = mesh.make_mesh(jax.devices()[:1])
    quick = compiled_steps.make_steps(model, lambda: tx, devices, **sizes).init_state
    full = jax.jit(partial(steps.init_state, model=model, tx=tx))
    jax.tree.map(np.testing.assert_array_equal, quick(key, {}, None, None), full(key))


@pytest.mark.parametrize(
    ("is_dynamic", "elapsed_s", "most", "calls"),
    [
        (True, 0.5, 99, [2, 4, 8, 1]),
        (True, 0.25, 5, [2, 5, 5, 3]),  # as process 0 says
        (True, 100.0, 99, [2, *[1] * 13]),
        (False, 0.5, 99, [15]),  # as on an accelerator
    ],
)
def test_a_call_is_to_last_a_second(is_dynamic, elapsed_s, most, calls, config, monkeypatch):
    """By a clock that goes on by `elapsed_s` whenever it is read."""
    clock = itertools.count(0.0, elapsed_s)
    monkeypatch.setattr(compiled_steps, "time", mock.Mock(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(compiled_steps, "distributed", mock.Mock(broadcast=lambda n: min(n, most)))
    monkeypatch.setattr(compiled_steps, "dynamic_loop_bound", lambda platform: is_dynamic)
    timings = fit(config(epochs=1), callbacks=[watch := mock.Mock()]).record["timings"]
    ends = [call.args[1] for call in watch.on_chunk_end.call_args_list]
    assert np.diff(ends, prepend=0).tolist() == calls
    assert timings["train_s"] == elapsed_s * len(calls)  # without that of compiling
    assert (timings["eval_s"], timings["compile_s"]) == (elapsed_s, 4 * elapsed_s)


def test_a_training_call_donates_the_state(config):
    with mock.patch.object(Trainer, "train", autospec=True, side_effect=Trainer.train) as train:
        fit(config(epochs=1, steps_per_call=5), callbacks=())
    states = [call.args[1] for call in train.call_args_list]
    assert len(states) == 3 and all(leaf.is_deleted() for leaf in jax.tree.leaves(states))


@pytest.mark.parametrize("problem", ["no graph", "RESOURCE_EXHAUSTED"])
def test_a_step_that_cannot_be_one_graph_is_several(problem, config, monkeypatch, tmp_path):
    """The first call has consumed the state when it fails."""
    block, calls = jax.block_until_ready, []

    def failing_once(result):
        calls.append(block(result))
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError(problem)
        return result

    options = {True: {"xla_backend_optimization_level": 3}, False: {}}
    choose = lambda _, deterministic, one_graph=True: options[one_graph and deterministic]  # noqa: E731
    monkeypatch.setattr(compiled_steps, "compiler_options", choose)
    monkeypatch.setattr(jax, "block_until_ready", failing_once)
    if problem == "RESOURCE_EXHAUSTED":  # another attempt would end so too
        with pytest.raises(jax.errors.JaxRuntimeError):
            fit(config(deterministic=True), callbacks=())
        return
    with pytest.warns(UserWarning, match=r"several CUDA graphs, not one \(no graph\)"):
        found = fit(config(deterministic=True), callbacks=()).record
    monkeypatch.undo()
    expected = fit(config(workdir=tmp_path / "plain"), callbacks=()).record
    assert found["params_sha256"] == expected["params_sha256"] and found["warnings"]
