"""Peak resident memory of this process between two points, on Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_mib() -> float:
    """Resident memory now, MiB."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The highest resident memory since the process began or since `reset_peak`, MiB."""
    return _status("VmHWM")


def reset_peak() -> float:
    """Returns freed memory to the system, sets the peak to the present resident memory and returns that, MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that the warm-up freed counts as memory of the model
    _CLEAR.write_text("5")  # proc(5): resets the peak of the resident set
    return resident_mib()


def _status(key: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"{_STATUS} has no line {key}")
