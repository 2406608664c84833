"""How many CPUs other programs leave free, so that a run does not start more threads than it can use.

The threads of a network wait for each other after every step, and wait actively: on two CPUs, of which another program
used one, two threads took 1.6 times as long as one (`benchmarks/busy_cpus.py`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from mome.threads import container_cpus

_SHORTEST_S = 0.3  # the system counts in steps of 10 ms


class CpuLoad:
    """Counts what other programs use of the CPUs of this process, from here to `free`.

    Make it before the imports of a command, which take a second or two, so that nothing has to wait for the count.
    """

    def __init__(self) -> None:
        self._start = _counts()

    def free(self) -> float | None:
        """The CPUs that were free or used by this process, on average; None where that is unknown.

        It is unknown outside of Linux, where the system shows no counts of these CPUs, and before 0.3 s.
        """
        end = _counts()
        if self._start is None or end is None or end[0] - self._start[0] < _SHORTEST_S:
            return None
        seconds, busy, own = (last - first for first, last in zip(self._start, end, strict=True))
        return len(os.sched_getaffinity(0)) - max(0.0, busy - own) / seconds


def set_threads(count: int, load: CpuLoad | None = None) -> str | None:
    """Sets the CPU threads of torch: the given number, or as many as this process can use.

    Args:
        count: The number that the user asked for; 0 for torch's choice within the quota of the container.
        load: If given, threads are left out for the CPUs that other programs use, unless the user has set
            OMP_NUM_THREADS.

    Returns:
        A note if threads were left out.
    """
    import torch

    threads = count or min(torch.get_num_threads(), container_cpus())
    free = load.free() if load is not None and not count and "OMP_NUM_THREADS" not in os.environ else None
    kept = threads if free is None else max(1, min(threads, round(free)))
    torch.set_num_threads(kept)
    if kept == threads:
        return None
    used = len(os.sched_getaffinity(0)) - (free or 0.0)
    return (
        f"other programs use {used:.1f} CPUs, so {kept} of {threads} CPU threads are started; "
        f"OMP_NUM_THREADS={threads} starts all"
    )


def _counts() -> tuple[float, float, float] | None:
    """The time, how long our CPUs were busy since the system's start, and with what of this process, in seconds."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    names = {f"cpu{index}" for index in os.sched_getaffinity(0)}
    rows = (line.split() for line in lines if line.startswith("cpu"))
    found = {name: [int(word) for word in words[:8]] for name, *words in rows if name in names}
    if found.keys() != names:  # a container may show other numbers than those of the affinity
        return None
    # User, nice, system, idle and waiting; the last three are two kinds of interrupts, and what the host gave to other
    # guests. Old systems count fewer.
    busy = sum(sum(ticks) - sum(ticks[3:5]) for ticks in found.values())
    own = os.times()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.user + own.system
