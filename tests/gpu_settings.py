"""Settings of the tests on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# A process of these tests takes less, with its CUDA context and the workspaces of cuBLAS and cuDNN.
_NEEDED = 10**9
_WAIT_SECONDS = 30.0


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products and convolutions without TF32, which would round what a test compares with the CPU."""
    earlier = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = earlier


def wait_for_memory() -> None:
    """Waits until other processes leave memory on the GPU, and fails with a reason where they do not."""
    last = time.monotonic() + _WAIT_SECONDS
    while _free() < _NEEDED:
        if time.monotonic() > last:
            pytest.fail(f"other processes left {_free() / 1e9:.2f} GB of GPU memory free for {_WAIT_SECONDS:.0f} s")
        time.sleep(0.5)


def _free() -> int:
    """Bytes of free memory; 0 where not even a CUDA context fits."""
    try:
        return torch.cuda.mem_get_info()[0]
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return 0
