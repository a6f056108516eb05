"""Which device runs, how exactly it multiplies, and where its compiled programs are kept."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mnist_jax.errors import DeviceError, UsageError

# 'highest' keeps all 24 bits of a float32 product, also where the hardware's default is TF32 or,
# on TPU, bfloat16.
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
# Forbids operations whose sums come in any order, and the choice of algorithms by their speed of
# the day: either would give other bits from process to process.
DETERMINISTIC_OPTIONS = {"xla_gpu_deterministic_ops": True}
CACHE_BYTES = 512 * 2**20  # the least recently used programs go first


def select_device(platform: str) -> jax.Device:
    """The first device of a platform; of the best one that JAX finds for 'auto'.

    Raises:
        DeviceError: the platform is absent. Another one is never taken in its place.
    """
    try:
        return jax.devices(None if platform == "auto" else platform)[0]
    except (RuntimeError, AssertionError) as error:  # an assertion where no backend starts at all
        try:
            found = ", ".join(sorted({device.platform for device in jax.devices()}))
        except (RuntimeError, AssertionError):
            found = "none"
        told = os.environ.get("JAX_PLATFORMS")
        limit = f" with JAX_PLATFORMS={told}" if told else ""
        raise DeviceError(
            f"no {platform} device; JAX finds {found}{limit}; "
            "install JAX for it (the extras cuda12, cuda13, tpu) or leave --platform out"
        ) from error


@contextlib.contextmanager
def running_on(platform: str, precision: str) -> Iterator[jax.Device]:
    """Selects the device, as `select_device` does, and makes its products that precise inside."""
    device = select_device(platform)
    with jax.default_device(device), jax.default_matmul_precision(MATMUL_PRECISION[precision]):
        yield device


def compiler_options(device: jax.Device, *, deterministic: bool) -> dict[str, bool] | None:
    """What XLA is told for `--deterministic`: CPU and TPU are so by themselves."""
    return DETERMINISTIC_OPTIONS if deterministic and device.platform == "gpu" else None


def memory_bytes(device: jax.Device) -> int | None:
    """The memory that arrays on the device can take; None where the system does not say."""
    try:
        if device.platform == "cpu":
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def compute_dtype(precision: str, device: jax.Device) -> Dtype | None:
    """The dtype that layers compute in; None leaves them at their parameters' float32.

    Raises:
        UsageError: the device has no such precision.
    """
    if precision == "tf32" and not _has_tf32(device):
        raise UsageError(
            f"precision is 'tf32', which this device ({device.device_kind}) does not have; "
            "allowed here are bfloat16, float32; change --precision"
        )
    return jnp.bfloat16 if precision == "bfloat16" else None


def _has_tf32(device: jax.Device) -> bool:
    """NVIDIA's GPUs have it from Ampere on, which is compute capability 8.0."""
    major, _, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return device.platform == "gpu" and major.isdecimal() and int(major) >= 8


def slow_precision(precision: str, device: jax.Device) -> list[str]:
    """Notices: a precision that the device only emulates."""
    if precision == "bfloat16" and device.platform == "cpu":
        return ["bfloat16 on a CPU is slower than float32; it shows the accuracy, not the speed"]
    return []


def keep_compiled(folder: Path | None) -> list[str]:
    """Keeps compiled programs in `folder` across processes, unless JAX was told where already.

    For the process's owner to call, before anything is compiled.

    Returns:
        Notices: why the folder cannot be used, in which case programs are compiled every time.
    """
    elsewhere = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None or elsewhere is not None:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"compiled programs are not kept: cannot write {folder} ({error.strerror})"]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return []
