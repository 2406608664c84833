"""Threads are left out for the CPUs that other programs use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

from mome import cpu_load
from mome.cpu_load import CpuLoad, set_threads


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _load(monkeypatch: pytest.MonkeyPatch, cpus: int, others: float, own: float = 0.5, seconds: float = 2.0) -> CpuLoad:
    """A load as if others and this process had used so many CPUs of those that it may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    monkeypatch.setattr(cpu_load, "container_cpus", lambda: cpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cpus)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    counts = iter([(10.0, 500.0, 3.0), (10.0 + seconds, 500.0 + (others + own) * seconds, 3.0 + own * seconds)])
    monkeypatch.setattr(cpu_load, "_counts", lambda: next(counts))
    return CpuLoad()


@pytest.mark.parametrize(
    ("cpus", "others", "threads"), [(2, 0.0, 2), (2, 0.4, 2), (2, 1.0, 1), (2, 2.0, 1), (16, 6.9, 9), (1, 1.0, 1)]
)
def test_threads_are_those_that_others_leave(
    monkeypatch: pytest.MonkeyPatch, cpus: int, others: float, threads: int
) -> None:
    started: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", started.append)
    note = set_threads(0, _load(monkeypatch, cpus, others))
    assert started == [threads]
    if threads == cpus:
        assert note is None
    else:
        assert note is not None
        assert f"other programs use {others:.1f} CPUs, so {threads} of {cpus} CPU threads" in note


def test_what_the_user_asks_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", started.append)
    assert set_threads(3, _load(monkeypatch, 4, 4.0)) is None
    load = _load(monkeypatch, 4, 4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert set_threads(0, load) is None
    assert started == [3, 4]


def test_a_short_time_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _load(monkeypatch, 2, 2.0, seconds=0.1).free() is None


@pytest.mark.parametrize(
    ("lines", "busy"),
    [
        ("cpu  9 9 9 9 9 9 9 9 0 0\ncpu2 100 20 30 900 80 4 5 6 0 0\ncpu3 10 0 5 99 9 0 0 0 0 0\nintr 5", 1.8),
        ("cpu2 100 20 30 900\ncpu3 10 0 5 99\n\nintr 5", 1.65),  # fewer counts
        ("cpu2 100 20 30 900 80 4 5 6 0 0\ncpu0 10 0 5 99 9 0 0 0 0 0", None),  # other numbers than the affinity's
        ("cpu  1 2 3 4 5", None),
        ("", None),
    ],
)
def test_counts_are_those_of_all_cpus_of_this_process(
    monkeypatch: pytest.MonkeyPatch, lines: str, busy: float | None
) -> None:
    """Counts that are no counts of these CPUs say nothing, and a file of another form ends no command."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(cpu_load.Path, "read_text", lambda path: lines)
    found = cpu_load._counts()
    assert (found and found[1]) == busy


def test_a_container_needs_only_its_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 CPUs 20 are busy, which leaves more than the quota of 4."""
    load = _load(monkeypatch, 64, 20.0)
    monkeypatch.setattr(cpu_load, "container_cpus", lambda: 4)
    started: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", started.append)
    assert set_threads(0, load) is None
    assert started == [4]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the counts of the system are read on Linux only")
def test_own_work_does_not_count_as_that_of_others() -> None:
    """The counts of this machine: what this process does is not counted, and nothing is below zero."""
    load = CpuLoad()
    counts_before = cpu_load._counts()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    counts_after = cpu_load._counts()
    assert counts_before is not None
    assert counts_after is not None
    busy, own = counts_after[1] - counts_before[1], counts_after[2] - counts_before[2]
    assert own > 0.05
    assert busy > own - 0.1  # what this process did is part of what the CPUs did
    free = load.free()
    assert free is not None
    assert 0 <= free <= len(os.sched_getaffinity(0)) + 0.1
