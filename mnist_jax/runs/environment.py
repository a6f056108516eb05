"""Where a number was made: versions, device, machine and commit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Environment variables that change speed or numbers. Others may hold addresses or user names, and
# reports are shared.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "XLA_FLAGS"),
)
PREFIXES = ("MALLOC_", "XLA_PYTHON_CLIENT_", "JAX_")


def describe(device: jax.Device) -> dict[str, Any]:
    """What a number depends on besides the config, as JSON can hold it."""
    cpu = _cpu()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.local_device_count(device.platform),
        "processes": jax.process_count(),
        "driver": _driver(device),
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "instruction_set": _instruction_set(cpu.get("flags", "").split()),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "variables": _variables(),
        **_git_commit(),
    }


def _variables() -> dict[str, str]:
    """The environment variables that change speed or numbers, without paths and addresses."""
    names = sorted(n for n in os.environ if n in VARIABLES or n.startswith(PREFIXES))
    words = {
        name: [w for w in os.environ[name].split() if not set(w) & set("/:@")] for name in names
    }
    return {name: " ".join(kept) for name, kept in words.items() if kept}


def _driver(device: jax.Device) -> str | None:
    """The runtime and driver of an accelerator, as they name themselves; None for a CPU."""
    if device.platform == "cpu":
        return None
    lines = [device.client.platform_version]
    with contextlib.suppress(OSError):
        lines += Path("/proc/driver/nvidia/version").read_text().splitlines()[:1]
    return "; ".join(" ".join(line.split()) for line in lines)


def _cpu() -> dict[str, str]:
    """The first processor's entries in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _instruction_set(flags: list[str]) -> str | None:
    """The widest vector instructions of an x86 CPU; another set gives other bits."""
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    return next((names[flag] for flag in names if flag in flags), None)


def _git_commit() -> dict[str, Any]:
    """The commit of this source tree; None if git does not track this file."""

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
        # Only code, committed or not: results and pages change no number.
        dirty = bool(git("status", "-s", "--", ".", ":/*.py"))
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
