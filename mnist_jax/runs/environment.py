"""The environment of a run: versions, device, machine, code and commit."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Environment variables that change speed or numbers begin with these. Others may hold addresses or
# user names, and reports are shared.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "JAX_", "LIBTPU_INIT_ARGS", "MALLOC_"),
    *("NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_"),
)
# Flags of x86 CPUs, the widest vectors first: another instruction set gives other bits.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}


def describe(device: jax.Device) -> dict[str, Any]:
    """What a number depends on besides the config, as JSON can hold it."""
    cpu = _cpu()
    flags = cpu.get("flags", "").split()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.local_device_count(device.platform),
        "processes": jax.process_count(),
        "driver": device.client.platform_version,
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "instruction_set": next((name for flag, name in VECTORS.items() if flag in flags), None),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": platform.platform(),
        "variables": _variables(),
        "code_sha256": _code_sha256(),
        **_git_commit(),
    }


def _variables() -> dict[str, str]:
    """The environment variables that change speed or numbers, without paths and addresses."""
    found = {}
    for name, value in sorted(os.environ.items()):
        words = [word for word in value.split() if not set(word) & set("/:@")]
        if words and name.startswith(VARIABLES):
            found[name] = " ".join(words)
    return found


def _cpu() -> dict[str, str]:
    """The first processor's entries in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _code_sha256() -> str:
    """SHA-256 over the package's Python files."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _git_commit() -> dict[str, Any]:
    """The commit of this source tree; None if git does not track this file."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=10)
        return done.stdout.strip()

    found: dict[str, Any] = {"git_commit": None, "git_dirty": None}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # Also if another user owns the files, as in a container: these two run no code of theirs.
        anyones = "-c", "safe.directory=*"
        git(*anyones, "ls-files", "--error-unmatch", Path(__file__).name)
        found["git_commit"] = git(*anyones, "rev-parse", "HEAD")
        # Only code, committed or not: results and pages change no number.
        found["git_dirty"] = bool(git("status", "-s", "--", ".", ":/*.py"))
    return found
