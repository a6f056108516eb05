"""What XLA is told: options, the precision of products, the cache of compiled programs."""

import os
from unittest import mock

import jax
import jax.numpy as jnp

from mnist_jax.compiler import compiler_options, enable_compilation_cache, use_device


def test_compiler_options_are_those_of_the_device(monkeypatch):
    """XLA would refuse a wrong name here too."""
    cpu, names = jax.devices()[0], {"H100": "9.0", "MI300": "gfx942"}
    h100, mi300 = (mock.Mock(platform="gpu", compute_capability=c) for c in names.values())
    for device, count in ((cpu, 0), (mi300, 2), (h100, 3)):
        options = compiler_options(device, deterministic=True)
        assert len(options) == count
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
    [graph] = compiler_options(h100)
    assert compiler_options(h100, one_graph=False) == compiler_options(mi300) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{graph}=FUSION")
    assert compiler_options(h100) == {}


def test_inside_use_device_numbers_do_not_depend_on_jaxs_settings():
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:1], ("x",))
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"), jax.set_mesh(mesh):
        with use_device("cpu", "float32") as device:
            assert jax.sharding.get_abstract_mesh().empty
            assert device == jax.devices("cpu")[0]
            assert jnp.zeros(1, float).dtype == jnp.float32
            text = jax.jit(jnp.dot).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).as_text()
            assert "HIGHEST" in text
        assert jnp.zeros(1, float).dtype == jnp.float64


def test_a_compilation_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    before = os.environ["JAX_COMPILATION_CACHE_DIR"]  # set by conftest.py
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        (warning,) = enable_compilation_cache(tmp_path / "file" / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert warning.startswith("no compilation cache: cannot write")
