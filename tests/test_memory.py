"""Freed memory is kept by the process."""

import platform
import subprocess
import sys

import pytest

TWICE = """
import resource, threading
import numpy as np
from mnist_jax import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {kept}:
    memory.keep_freed()
found = [faults()]
thread = threading.Thread(target=lambda: found.append(faults()))
thread.start()
thread.join()
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_a_second_array_takes_the_memory_of_the_first(kept):
    """Of 160 MB, also where another thread makes it, as JAX's do."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(kept=kept)], check=True, capture_output=True, text=True
    )
    first, second = map(int, done.stdout.split())
    assert first > 100
    assert second < first / 10 if kept else second > first / 2
