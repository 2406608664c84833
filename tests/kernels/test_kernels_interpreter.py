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


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    cases = Path(__file__).with_name("interpreted_cases.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def test_kernels_agree_with_float64(results: dict) -> None:
    assert len(results) == 69
    for name, result in results.items():
        limit = LIMITS.get(result["dtype"], 5e-6)
        assert all(error < limit for error in result["errors"]), (name, result["errors"])  # a NaN is not below


def test_reruns_are_bit_equal(results: dict) -> None:
    assert not [name for name, result in results.items() if not result["bit_equal"]]
