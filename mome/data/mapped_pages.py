"""Gives back the memory that a memory-mapped file takes in this process."""

from __future__ import annotations

import mmap
from typing import Any


def release_pages(array: Any) -> None:
    """Takes the pages of a memory-mapped array out of this process; the system keeps them in its cache of files.

    The resident memory of a process then does not grow with the number of cases that it has read, which counts where a
    scheduler ends jobs by it. Reading the array again is as before. Other arrays are left alone.

    Args:
        array: An array as `np.load(…, mmap_mode="r")` returns it, or any other.
    """
    mapped = getattr(array, "base", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
