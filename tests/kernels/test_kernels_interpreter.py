"""The Triton kernels, run by Triton's interpreter on the CPU: see `interpreted_cases.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

LIMITS = {"torch.float16": 2e-3, "torch.bfloat16": 2e-2}
TIERS = [
    pytest.param("quick", 47, id="quick"),
    pytest.param("wide", 33, id="wide", marks=pytest.mark.wide),
    pytest.param("long", 2, id="long", marks=pytest.mark.long),
]


@pytest.mark.timeout(1200)  # the interpreter is slow, and other programs may keep the processors busy
@pytest.mark.parametrize(("tier", "count"), TIERS)
def test_kernels_agree_with_float64_and_reruns_are_bit_equal(tier: str, count: int) -> None:
    cases = Path(__file__).with_name("interpreted_cases.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(cases), tier],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    results = {line["name"]: line for line in lines}
    assert len(results) == count
    for name, result in results.items():
        limit = LIMITS.get(result["dtype"], 5e-6)
        assert all(error < limit for error in result["errors"]), (name, result["errors"])  # NaN fails as well
    assert not [name for name, result in results.items() if not result["bit_equal"]]
