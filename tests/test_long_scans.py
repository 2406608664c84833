"""A log file says how long a scan will take."""

from __future__ import annotations

import pytest

from mome.cli import long_scans
from mome.cli.long_scans import LongScans


@pytest.mark.parametrize(
    ("total", "said"), [(1573, ["the network has 1,570 of 1,573 tiles to go, about 13 minutes"]), (240, []), (2, [])]
)
def test_a_long_scan_is_announced_once(monkeypatch: pytest.MonkeyPatch, total: int, said: list[str]) -> None:
    """A tile takes half a second."""
    lines: list[str] = []
    scans = LongScans(lines.append)
    for _ in range(2):  # the next scan begins again
        for done in range(1, total + 1):
            monkeypatch.setattr(long_scans.time, "monotonic", lambda done=done: 100 + 0.5 * done)
            scans.progress(done, total)
    assert lines == 2 * said
