"""Settings of the C library's allocator, from which tensors on a CPU take their memory."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1
_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the whole process.

    A training step frees hundreds of large tensors, and the next takes as many. glibc returns large blocks to the
    kernel, which hands out and clears new pages at every first touch. Kept, the same memory serves all steps; peak
    memory is about the same.

    Returns:
        Whether glibc took the settings: not where there is another C library, or where the environment chooses
        (``GLIBC_TUNABLES``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOSEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Older glibc refuses a threshold over 32 MiB.
    mapped = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
    return bool(mapped) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
