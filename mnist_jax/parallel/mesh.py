"""Devices: which ones run, at what precision, and how arrays are sharded over their mesh."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock
from flax.typing import Dtype
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnist_jax.errors import DeviceError, UsageError, first_line

# 'highest' keeps all 24 bits of float32, also where the default is TF32 or, on TPU, bfloat16.
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
# Forbids sums in an arbitrary order, and algorithms (Triton's among them) chosen by measured speed:
# both give other bits from process to process.
DETERMINISTIC_OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
# What XLA puts into CUDA graphs: its own list (of jax 0.10 to 0.12), and convolutions.
COMMAND_BUFFER = "xla_gpu_enable_command_buffer"
COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,CONVOLUTION"
CACHE_BYTES = 512 * 2**20  # of the compilation cache; the least recently used programs go first


def select_device(platform: str) -> jax.Device:
    """This process's first device of a platform; for 'auto', of the best platform JAX finds.

    Raises:
        DeviceError: the platform is absent. No other one is taken in its place.
    """
    try:
        return jax.local_devices(backend=None if platform == "auto" else platform)[0]
    except (RuntimeError, AssertionError) as error:  # an assertion if no backend starts at all
        raise DeviceError(
            f"no device for --platform={platform} ({first_line(error) or 'JAX finds none'}); "
            "install JAX for it (the extras cuda12, cuda13, tpu), or change --platform or "
            "JAX_PLATFORMS"
        ) from error


@contextlib.contextmanager
def use_device(platform: str, precision: str) -> Iterator[jax.Device]:
    """Selects the device, as `select_device` does, and sets the precision of products inside.

    Inside, JAX settings that change numbers (x64, the random bits of a sharded array) have their
    defaults, whatever the environment says. Settings that only check or debug stay as they are.
    """
    device = select_device(platform)
    with (
        jax.default_device(device),
        jax.default_matmul_precision(MATMUL_PRECISION[precision]),
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
    ):
        yield device


def select_devices(first: jax.Device, count: int | Literal["all"] | None) -> list[jax.Device]:
    """Devices of the platform of `first`, over all processes.

    Args:
        first: of this process, as from `select_device`.
        count: None for one, or for all if there are several processes.

    Raises:
        DeviceError: there are fewer, or several processes would not use all of theirs.
    """
    found, processes = jax.devices(first.platform), jax.process_count()
    if count is None:
        return found if processes > 1 else [first]
    if count in ("all", len(found)):
        return found
    if processes > 1 or count > len(found):
        raise DeviceError(
            f"devices is {count}; JAX finds {len(found)} of {first.platform}; change --devices, "
            "leave it out for several processes, or set JAX_NUM_CPU_DEVICES for a CPU"
        )
    return found[:count]


def make_mesh(devices: Sequence[jax.Device], members: int | None = None) -> Mesh:
    """A mesh of one axis: "batch", or "members" if there are several networks to train.

    Raises:
        UsageError: the devices do not divide the members.
    """
    count = len(devices)
    if members is not None and members % count:
        nearest = [n for n in (members // count * count, -(-members // count) * count) if n]
        raise UsageError(
            f"{count} devices do not divide {members} networks; train "
            f"{' or '.join(map(str, nearest))}, or change --devices"
        )
    # Auto: XLA propagates shardings from that of the batch. Not `jax.make_mesh`, which on a TPU
    # accepts only device counts that fill its topology.
    axis = "batch" if members is None else "members"
    return Mesh(np.asarray(devices), (axis,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of an array."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """The first axis of an array (examples of a batch, or members) is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*mesh.axis_names))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays, which every process has, as arrays on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # `device_put` would compare the arrays of all processes first.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )


def to_host(tree: Any) -> Any:
    """As NumPy arrays in every process, which all must call this if there are several."""

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


def compiler_options(
    device: jax.Device, *, deterministic: bool = False, one_graph: bool = True
) -> dict[str, Any]:
    """XLA's options for the programs of a run.

    With `one_graph`, a training step on one NVIDIA GPU becomes one CUDA graph as a rule, unless
    XLA_FLAGS says what belongs into graphs. CPU and TPU are deterministic without options.
    """
    options: dict[str, Any] = {}
    is_nvidia = re.match(r"\d+\.", _compute_capability(device))
    if one_graph and is_nvidia and COMMAND_BUFFER not in os.environ.get("XLA_FLAGS", ""):
        options[COMMAND_BUFFER] = COMMANDS
    if deterministic and device.platform == "gpu":
        options |= DETERMINISTIC_OPTIONS
    return options


def _compute_capability(device: jax.Device) -> str:
    """Such as 9.0 of an NVIDIA GPU, or gfx942 of an AMD GPU; empty for other devices."""
    return getattr(device, "compute_capability", "")


def compute_dtype(precision: str, device: jax.Device) -> Dtype | None:
    """The dtype that layers compute in; None for that of their float32 parameters.

    Raises:
        UsageError: the device has no TF32.
    """
    has_tf32 = re.match(r"([89]|\d\d)\.", _compute_capability(device))  # 8.0 and above
    if precision == "tf32" and not has_tf32:
        raise UsageError(
            f"precision is 'tf32', which this device ({device.device_kind}) does not have; "
            "allowed here are bfloat16, float32; change --precision"
        )
    return jnp.bfloat16 if precision == "bfloat16" else None


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
