"""Where a number was made: the versions, the device, the machine and the commit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe(device: jax.Device) -> dict[str, Any]:
    """What a number depends on besides the config, as JSON can hold it."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.local_device_count(device.platform),
        "processes": jax.process_count(),
        "driver": _driver(device),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("XLA_", "JAX_", "LIBTPU_", "NVIDIA_TF32"))
        },
        **_git_commit(),
    }


def _driver(device: jax.Device) -> str | None:
    """The version of what runs a device that is not the CPU, as its runtime and system name it."""
    if device.platform == "cpu":
        return None
    lines = [device.client.platform_version]
    with contextlib.suppress(OSError):
        lines += Path("/proc/driver/nvidia/version").read_text().splitlines()[:1]
    return "; ".join(" ".join(line.split()) for line in lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> dict[str, Any]:
    """The commit of this source tree; None where git does not track this file."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        # Of code alone, also what is not committed yet: results and pages make no number another.
        dirty = bool(git("status", "-s", "--", ".", ":/*.py"))
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
