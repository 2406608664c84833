"""Which implementation runs on a tensor's device.

CPU tensors take the blocked torch code. CUDA (and ROCm) tensors take the Triton kernels where those support the
shapes, and the same torch code elsewhere: every op is right on every device.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from . import cpu_experts, cpu_head


def _triton_wanted(x: Tensor) -> bool:
    # Triton's interpreter runs its kernels on the CPU; the tests use it.
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _triton(name: str) -> ModuleType:
    try:
        import importlib

        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        raise RuntimeError(
            "the GPU kernels of mome need triton, which cannot be imported\n  try: pip install triton"
        ) from error


def experts(x: Tensor) -> ModuleType:
    """The expert layers for a tensor.

    Raises:
        RuntimeError: A CUDA tensor, and triton is not installed.
    """
    return _triton("triton_experts") if _triton_wanted(x) else cpu_experts


def head(features: Tensor) -> ModuleType:
    """The fusion head for a tensor.

    Raises:
        RuntimeError: A CUDA tensor, and triton is not installed.
    """
    if _triton_wanted(features):
        kernels = _triton("triton_head")
        if kernels.supports(features):
            return kernels
    return cpu_head
