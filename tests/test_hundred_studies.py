"""A folder of 100 studies, 10 broken, killed twice; see `hundred_studies.py`, which has the checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.wide
@pytest.mark.timeout(600)
def test_a_hundred_studies_killed_twice(tmp_path: Path) -> None:
    script, result = Path(__file__).with_name("hundred_studies.py"), tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cohort"), str(result)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counted = json.loads(result.read_text())
    assert (counted["studies"], counted["done"], len(counted["failed"])) == (100, 90, 10)
