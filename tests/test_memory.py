"""Freed memory is kept by the process."""

import platform
import subprocess
import sys

import pytest

TWICE = """
import os, resource, threading
import numpy as np
from mnist_jax.ops import malloc as memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {kept}:
    memory.tune_glibc()
found = [faults()]
thread = threading.Thread(target=lambda: found.append(faults()))
thread.start()
thread.join()
pages = lambda: int(open("/proc/self/statm").read().split()[1])
before = pages()
memory.trim()
print(*found, (before - pages()) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_a_second_array_takes_the_memory_of_the_first(kept):
    """Of 160 MB, also where another thread makes it, as JAX's do."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(kept=kept)], check=True, capture_output=True, text=True
    )
    first, second, given_back = map(int, done.stdout.split())
    assert first > 70  # 77 pages of 2 MiB, or 39,000 of 4 KiB
    assert second < 20 if kept else second > 70
    assert given_back > 150e6 if kept else given_back < 50e6
