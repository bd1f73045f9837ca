"""Where the C library's allocator is told to keep memory. Knows nothing of what is allocated."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Parameters of glibc's mallopt (malloc.h), and what they are afterwards: the default, and where glibc's own adjustment
# of the two thresholds ends in a process that allocates large blocks. (Setting one switches that adjustment off.)
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
AFTERWARDS = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block, memory that is freed stays with the process; at the end it goes back to the system.

    A training step on a CPU allocates and frees the same large tensors again and again. By default glibc returns each
    to the kernel, which clears its pages again at the next use: 7 % of a step. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(MMAP_MAX, 0)  # large blocks come from the heap too
    mallopt(TRIM_THRESHOLD, -1)  # and the heap does not shrink
    try:
        yield
    finally:
        for parameter, value in AFTERWARDS.items():
            mallopt(parameter, value)
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
