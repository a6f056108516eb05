"""glibc's malloc reuses freed memory after `tune_glibc` and returns it after `trim`."""

import platform

import pytest
from shared import python

PROGRAM = """
import os, resource, threading
import numpy as np
from mnist_jax.ops import malloc

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000)  # 160 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

malloc.has_accelerator = lambda: not {tuned}
malloc.tune_glibc()
faults = [page_faults()]
thread = threading.Thread(target=lambda: faults.append(page_faults()))  # XLA allocates in threads
thread.start()
thread.join()
before = resident_bytes()
malloc.trim()
print(*faults, before - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("tuned", [True, False])
def test_on_a_cpu_a_second_array_reuses_the_memory_of_the_first(tuned):
    done = python("-c", PROGRAM.format(tuned=tuned), JAX_PLATFORMS="")
    first, second, trimmed = map(int, done.stdout.split())
    assert first > 70  # 77 pages of 2 MiB, or 39,000 of 4 KiB
    assert second < 20 if tuned else second > 70
    assert trimmed > 150e6 if tuned else trimmed < 50e6
