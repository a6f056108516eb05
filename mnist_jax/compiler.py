"""How XLA compiles: the precision of products, determinism, CUDA graphs, the cache of programs."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock

from mnist_jax.errors import UsageError
from mnist_jax.parallel.mesh import select_device

# 'highest' keeps all 24 bits of float32, also where the default is TF32 or, on TPU, bfloat16.
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
# What layers compute in; None: in the dtype of their float32 parameters.
COMPUTE_DTYPE = {"float32": None, "tf32": None, "bfloat16": jnp.bfloat16}
# Forbids sums in an arbitrary order, and algorithms (Triton's among them) chosen by measured speed:
# both give other bits from process to process.
DETERMINISTIC_OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
# What XLA puts into CUDA graphs: its own list (of jax 0.10 to 0.12), and convolutions.
COMMAND_BUFFER = "xla_gpu_enable_command_buffer"
COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,CONVOLUTION"
NO_MESH = jax.sharding.Mesh(np.empty((), object), ())  # in place of one that the caller has set
CACHE_BYTES = 512 * 2**20  # of the compilation cache; the least recently used programs go first


@contextlib.contextmanager
def use_device(platform: str, precision: str) -> Iterator[jax.Device]:
    """Selects the device, as `select_device` does, and sets the precision of products inside.

    Inside, JAX settings that change numbers (x64, the random bits of a sharded array) have their
    defaults, whatever the environment says. Settings that only check or debug stay as they are.
    """
    device = select_device(platform)
    has_mesh = not jax.sharding.get_abstract_mesh().empty
    with (
        jax.set_mesh(NO_MESH) if has_mesh else contextlib.nullcontext(),  # not while tracing
        jax.default_device(device),
        jax.default_matmul_precision(MATMUL_PRECISION[precision]),
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield device


def compiler_options(
    device: jax.Device, *, deterministic: bool = False, one_graph: bool = True
) -> dict[str, Any]:
    """XLA's options for the programs of a run.

    With `one_graph`, a training step on one NVIDIA GPU becomes one CUDA graph as a rule, unless
    XLA_FLAGS says what belongs into graphs. CPU and TPU are deterministic without options.
    """
    options: dict[str, Any] = {}
    is_nvidia = re.match(r"\d+\.", getattr(device, "compute_capability", ""))  # AMD: "gfx942"
    if one_graph and is_nvidia and COMMAND_BUFFER not in os.environ.get("XLA_FLAGS", ""):
        options[COMMAND_BUFFER] = COMMANDS
    if deterministic and device.platform == "gpu":
        options |= DETERMINISTIC_OPTIONS
    return options


def check_precision(precision: str, device: jax.Device) -> None:
    """Raises UsageError if the precision is TF32 and the device has none."""
    has_tf32 = re.match(r"([89]|\d\d)\.", getattr(device, "compute_capability", ""))  # 8.0 and up
    if precision == "tf32" and not has_tf32:
        raise UsageError(
            f"precision is 'tf32', which this device ({device.device_kind}) does not have; "
            "allowed here are bfloat16, float32; change --precision"
        )


def enable_compilation_cache(folder: Path | None) -> list[str]:
    """Keeps compiled programs in `folder` for later processes, unless JAX already has a folder.

    Returns warnings. The settings belong to the process: call this from a main function, before
    compiling.
    """
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None or configured is not None:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lockfile", timeout=10):  # as JAX will do
            pass
    except OSError as error:
        return [f"no compilation cache: cannot write {folder} ({error.strerror or error})"]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return []
