"""CPU threads and processes: how many a user may ask for, how many a container gives, and large pages for them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mome.errors import InputError


def check_threads(count: int, option: str) -> None:
    """Checks a number of threads or processes; more than the system can start would end this process.

    Args:
        count: The number; 0 stands for a default.
        option: Its name in the error, as in "--threads".

    Raises:
        InputError: It is negative, or above 256 and above four per CPU.
    """
    most = max(256, 4 * (os.cpu_count() or 1))
    if count < 0:
        raise InputError(f"{option} is at least 0, got {count}")
    if count > most:
        raise InputError(f"{option} is at most {most}, got {count}", hint=f"this machine has {os.cpu_count()} CPUs")


def container_cpus() -> int:
    """Returns the CPUs that this process may use: those of its affinity, and of the quota of its control group.

    More threads than a quota allows wait for each other.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = Path("/sys/fs/cgroup")
    for quota, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # "max" and −1 mean that there is no quota
            words = (groups / quota).read_text().split()
            length = int(words[1]) if period is None else int((groups / period).read_text())
            if int(words[0]) > 0:
                count = min(count, max(1, -(-int(words[0]) // length)))
    return count


def use_huge_pages() -> None:
    """Lets torch take memory in pages of 2 MB, where it was not loaded yet and the user has not decided otherwise.

    A network of 3D convolutions takes and gives back much memory; with small pages, the system's work for that was
    about 15 % of the time of the encoder (our measurement).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
