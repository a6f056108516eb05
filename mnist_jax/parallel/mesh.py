"""Which devices run, how arrays lie on them, how exactly they multiply, and what is compiled."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnist_jax.errors import DeviceError, UsageError

# 'highest' keeps all 24 bits of a float32 product, also where the hardware's default is TF32 or,
# on TPU, bfloat16.
MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
# Forbids operations whose sums come in any order, and the choice of algorithms by their speed of
# the day: either would give other bits from process to process. Products are left to cuBLAS then:
# kernels of the compiler's own are chosen by their speed.
DETERMINISTIC_OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
CACHE_BYTES = 512 * 2**20  # the least recently used programs go first


def select_device(platform: str) -> jax.Device:
    """This process's first device of a platform; of the best one that JAX finds for 'auto'.

    Raises:
        DeviceError: the platform is absent. Another one is never taken in its place.
    """
    try:
        return jax.local_devices(backend=None if platform == "auto" else platform)[0]
    except (RuntimeError, AssertionError) as error:  # an assertion where no backend starts at all
        try:
            found = ", ".join(sorted({device.platform for device in jax.devices()}))
        except (RuntimeError, AssertionError):
            found = "none"
        told = os.environ.get("JAX_PLATFORMS")
        limit = f" with JAX_PLATFORMS={told}" if told else ""
        if (count := os.environ.get("JAX_NUM_CPU_DEVICES")) == "0":
            limit += f" with JAX_NUM_CPU_DEVICES={count}"
        missing = "device" if platform == "auto" else f"{platform} device"
        otherwise = "unset JAX_PLATFORMS" if told else "leave --platform out"
        raise DeviceError(
            f"no {missing}; JAX finds {found}{limit}; "
            f"install JAX for it (the extras cuda12, cuda13, tpu) or {otherwise}"
        ) from error


@contextlib.contextmanager
def running_on(platform: str, precision: str) -> Iterator[jax.Device]:
    """Selects the device, as `select_device` does, and makes its products that precise inside.

    Settings of JAX's that would give other numbers, or that what runs inside is not made for, are
    inside what they are by default, whatever the environment or the caller says.

    Raises:
        DeviceError: as `select_device`.
        UsageError: JAX's seeds are offset, which would make other numbers of the same seed.
    """
    device = select_device(platform)
    if offset := jax.config.jax_random_seed_offset:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError(
            f"JAX_RANDOM_SEED_OFFSET is {offset}, which changes what every seed means; unset it "
            "and choose another --seed"
        )
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.default_device(device),
            jax.default_matmul_precision(MATMUL_PRECISION[precision]),
            jax.enable_x64(False),
            jax.threefry_partitionable(True),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.transfer_guard("allow"),
            jax.disable_jit(False),
        ):
            stack.enter_context(setting)
        yield device


def select_devices(first: jax.Device, count: int | Literal["all"] | None) -> list[jax.Device]:
    """So many devices of the platform of `first`, those of all processes of the run included.

    Args:
        first: this process's own, as from `select_device`.
        count: None for one, and for all where several processes run together.

    Raises:
        DeviceError: there are fewer, or several processes would not all be used.
    """
    found = jax.devices(first.platform)
    if count == "all" or count == len(found) or (count is None and jax.process_count() > 1):
        return found
    if jax.process_count() > 1:
        raise DeviceError(
            f"devices is {count}; {jax.process_count()} processes have {len(found)} and use all of "
            "them; leave --devices out"
        )
    count = count or 1
    if count > len(found):
        more = f"; JAX_NUM_CPU_DEVICES={count} makes so many" if first.platform == "cpu" else ""
        raise DeviceError(
            f"devices is {count}; JAX finds {len(found)} {first.platform} device"
            f"{'s' * (len(found) > 1)}{more}; change --devices"
        )
    return found[:count]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run's arrays lie on its devices: a batch or the members of an ensemble are spread.

    What is not spread (parameters of a lone network, data, orders) is on every device as a whole.
    Members are spread evenly: where their number does not divide, the last is computed again to
    fill up. That is the only difference between what lies on the devices and what `fetch` gives.

    Attributes:
        devices: those of all processes; with members, in one process, only as many as shorten the
            run.
        members: how many networks are trained; None for one.
    """

    devices: tuple[jax.Device, ...]
    members: int | None = None

    @classmethod
    def over(cls, devices: list[jax.Device], members: int | None = None) -> "Layout":
        """The layout on these devices, leaving out those that would not shorten the run."""
        if members is not None and all(d.process_index == jax.process_index() for d in devices):
            rounds = -(-members // len(devices))
            devices = devices[: -(-members // rounds)]
        return cls(tuple(devices), members)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """None for one device, where nothing is said to the compiler of any layout."""
        if len(self.devices) == 1:
            return None
        # Auto: the compiler works out what lies where, from what is said of the batch. Not by
        # `jax.make_mesh`, which on TPUs takes only so many as fill a box.
        axis = "data" if self.members is None else "members"
        return Mesh(np.asarray(self.devices), (axis,), axis_types=(AxisType.Auto,))

    @functools.cached_property
    def whole(self) -> NamedSharding | None:
        """All of an array on every device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def spread(self) -> NamedSharding | None:
        """The first axis of an array (images of a batch, or members) spread over the devices."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*self.mesh.axis_names))

    @functools.cached_property
    def _gather(self) -> Any:
        return jax.jit(lambda x: x, out_shardings=self.whole)  # kept, or it compiles every time

    @property
    def per_device(self) -> int:
        """Networks trained on a device."""
        return -(-(self.members or 1) // len(self.devices))

    def place(self, tree: Any) -> Any:
        """NumPy arrays, whole on every device; every process has them."""
        if self.whole is None:
            return jax.device_put(tree, self.devices[0])
        return jax.tree.map(lambda x: _place(np.asarray(x), self.whole), tree)

    def place_state(self, tree: Any) -> Any:
        """NumPy arrays of what is trained: spread by member, or as `place` does."""
        if self.mesh is None or self.members is None:
            return self.place(tree)
        return jax.tree.map(lambda x: _place(self.fill_up(np.asarray(x)), self.spread), tree)

    def fill_up(self, array: np.ndarray) -> np.ndarray:
        """By member, the last one repeated until they divide."""
        if self.members is None or self.mesh is None:
            return array
        missing = self.per_device * len(self.devices) - len(array)
        return np.concatenate([array, array[-1:].repeat(missing, axis=0)]) if missing else array

    def fetch(self, tree: Any) -> Any:
        """As NumPy arrays, in every process; the inverse of `place_state`."""
        if jax.process_count() > 1 and not all(
            x.is_fully_replicated for x in jax.tree.leaves(tree)
        ):
            tree = self._gather(tree)
        tree = jax.device_get(tree)
        if self.members is None:
            return tree
        return jax.tree.map(lambda x: x[: self.members], tree)

    def shapes(self, tree: Any) -> Any:
        """The shapes and dtypes of what `fetch` makes of it."""
        leading = () if self.members is None else (self.members,)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*leading, *x.shape[len(leading) :]), x.dtype), tree
        )


def _place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    assert sharding is not None
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def compiler_options(device: jax.Device, *, deterministic: bool) -> dict[str, bool] | None:
    """What XLA is told for `--deterministic`: CPU and TPU are so by themselves."""
    return DETERMINISTIC_OPTIONS if deterministic and device.platform == "gpu" else None


def quick_to_compile(device: jax.Device) -> dict[str, int] | None:
    """What XLA is told of a program that runs once, and on a CPU takes longer to optimize."""
    return {"xla_backend_optimization_level": 1} if device.platform == "cpu" else None


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
