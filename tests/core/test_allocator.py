"""Memory that is freed stays with the process inside the block, and goes back after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource
import torch
from minigpt_cli.core.allocator import freed_memory_kept

torch.set_num_threads(1)
SIZE = 50_000_000  # bytes: larger than what glibc keeps by itself, whatever it has learned

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(SIZE // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

outside, start = faults(), resident()
with freed_memory_kept():
    faults()  # the heap grows to its size
    inside, held = faults(), resident()
print(outside, inside, held - start, resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_used_again_inside_the_block_and_given_back_after_it() -> None:
    """Counted in pages that the kernel had to provide: 50 MB are 12,208 of 4 kB. A child, whose heap is its own."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    outside, inside, held, left = map(int, done.stdout.split())
    if outside < 10_000:
        pytest.skip("this C library keeps freed memory by itself")
    assert inside < outside / 10
    assert held > 40_000_000
    assert left < 10_000_000
