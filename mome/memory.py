"""Memory of the machine, of the container and of this process."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from pathlib import Path

from mome.errors import InputError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")


def parse_bytes(text: str, option: str) -> int:
    """Returns the bytes that a user writes, as in "4GB" (10⁹), "4GiB" (2³⁰) or "500 MB".

    Args:
        text: A number with a unit.
        option: Its name in the error, as in "--memory".

    Raises:
        InputError: It is no positive number with such a unit.
    """
    match = re.fullmatch(r"\s*([0-9]{0,20}\.?[0-9]{1,20})\s*([a-z]*)\s*", str(text).lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match is not None and match[2] in _UNITS else 0
    if count < 1:
        raise InputError(f"{option} is a number of bytes with a unit, got {str(text)!r:.40}", hint="4GB, 4GiB, 500MB")
    return count


def as_text(count: float) -> str:
    """Returns bytes for a message, as in "3.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def available_bytes() -> float:
    """Returns the bytes that this process may still take: of the machine, and of its control group (container).

    Infinity where the system does not say.
    """
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    # Version 2 of control groups, then version 1. The cache of files counts as used there, but is given up when needed.
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" means that there is no limit
            most, now = (int((_CGROUPS / name).read_text()) for name in (limit, used))
            statistics = (_CGROUPS / limit).with_name("memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in statistics if line.split()[0] == cache)
            free.append(most - now + cached)
    return max(0.0, float(min(free)))


def process_bytes(peak: bool = False) -> int:
    """Returns the resident memory of this process, or its highest since the last `reset_peak`; 0 where unknown."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (_PROCESS / "status").read_text().splitlines()
        name = "VmHWM:" if peak else "VmRSS:"
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
    return 0


def reset_peak() -> bool:
    """Sets the highest resident memory to the present one; False where the system does not allow it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_freed() -> None:
    """Gives memory that was freed back to the system, where the C library is that of GNU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
