"""The server under clients that behave badly, and killed twice; see `server_stress.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from server_stress import check, run

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="the server needs mome[serve]")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_ten_clients_and_two_kills(tmp_path: Path) -> None:
    check(run(tmp_path, clients=10, seconds=15))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fifty_clients_and_two_kills(tmp_path: Path) -> None:
    check(run(tmp_path, clients=50, seconds=90))
