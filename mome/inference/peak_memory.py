"""The highest memory of this process while a study is in work, also where studies overlap."""

from __future__ import annotations

import sys
import threading

import torch

from mome.memory import process_bytes, reset_peak


class PeakMemory:
    """Keeps the highest memory of the process for every study that is in work.

    Linux counts the highest resident memory since it was last reset. Before each reset, what was counted is added to
    all studies that are in work, so that a study whose neighbours are read and written meanwhile loses nothing. Their
    memory counts, too. Where the system cannot reset its count, the numbers are those since the process began.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._highest: dict[str, dict[str, int]] = {}

    def begin(self, study: str) -> None:
        """Begins to count for a study."""
        with self._lock:
            self._count()
            reset_peak()
            _reset_gpus()
            self._highest[study] = {}

    def end(self, study: str) -> dict[str, int | None]:
        """Returns `peak_memory_bytes`, and `peak_gpu_memory_bytes` where a GPU is used, and forgets the study."""
        with self._lock:
            self._count()
            found = self._highest.pop(study, {})
            return {"peak_memory_bytes": None, **found}

    def _count(self) -> None:
        now = _peaks()
        for highest in self._highest.values():
            for name, value in now.items():
                highest[name] = max(value, highest.get(name, 0))


def _gpus() -> range:
    """Returns the numbers of the GPUs of this process; none where it uses none."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)


def _reset_gpus() -> None:
    for number in _gpus():
        torch.cuda.reset_peak_memory_stats(number)


def _peaks() -> dict[str, int]:
    """Returns the highest memory since the last reset, by name; without one that the system does not say."""
    found: dict[str, int] = {}
    if peak := process_bytes(peak=True) or _highest_of_process():
        found["peak_memory_bytes"] = peak
    if gpus := _gpus():
        found["peak_gpu_memory_bytes"] = max(torch.cuda.max_memory_allocated(number) for number in gpus)
    return found


def _highest_of_process() -> int:
    """Returns the largest resident memory since the process began, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
