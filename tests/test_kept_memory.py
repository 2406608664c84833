"""Memory that a process keeps for its next tensors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mome

_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from mome.kept_memory import keep_freed_memory
from mome.memory import process_bytes
kept = keep_freed_memory()
before = process_bytes()
block = b"x" * 100_000_000
del block
print(kept, process_bytes() - before > 80_000_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("variable", ["", "MALLOC_TRIM_THRESHOLD_"])
def test_freed_memory_is_kept_unless_the_user_decides(variable: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "LD_PRELOAD"}
    environment |= {variable: "131072"} if variable else {}
    root = str(Path(mome.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, root], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ([str(not variable)] * 2)
