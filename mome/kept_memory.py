"""Lets this process keep the memory that its tensors free, for the next ones."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt(3)
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Tells the allocator of glibc to reuse large blocks, where it would give each back to the system and ask again.

    A training step on the CPU frees and takes gigabytes, and the system fills every page with zeros: of a step of
    `mome_ct_tiny`, that was 1.1 of 3.9 seconds of CPU time. The peak memory grows by 6 to 17 % (our measurements).

    Returns:
        Whether the allocator took the settings; it is left alone where it is another one, or where the user has set
        it by an environment variable.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
    return False
