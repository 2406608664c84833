"""Which implementation runs on a tensor's device.

CPU tensors take blocked torch code; CUDA (and ROCm) tensors take the Triton kernels for the dtypes of tensor cores,
and the same torch code for others (float64) and on GPUs before Ampere: every op is right on every device. With
`TRITON_INTERPRET=1` the kernels run on the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import cpu_experts, cpu_grouped, cpu_head

# Read once, as Triton does when a kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result  # `moe_mlp` asks while it is traced
def _has_tensor_cores(device: torch.device) -> bool:
    """Ampere or later, or any ROCm device: older ones lack bfloat16 and the shared memory that the tiles need."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def wants_kernels(x: Tensor) -> bool:
    """Whether the device is one that the kernels serve."""
    if x.device.type == "cuda":
        return _has_tensor_cores(x.device)
    return x.device.type == "cpu" and _INTERPRETED


@contextlib.contextmanager
def settled(x: Tensor) -> Iterator[None]:
    """Where the body of an op runs: on the tensor's device, and in the dtypes it was given.

    Triton launches on the current device, not on the tensor's; and autocast reaches into an op's body, where it would
    round what is to be summed in float32.
    """
    guard = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with guard, torch.autocast(x.device.type, enabled=False):
        yield


def _kernels(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        raise RuntimeError(
            "the GPU kernels of mome need triton, which cannot be imported\n  try: pip install triton"
        ) from error


def _choose(x: Tensor, name: str, otherwise: ModuleType) -> ModuleType:
    return _kernels(name) if wants_kernels(x) and x.dtype in _KERNEL_DTYPES else otherwise


def router(ids: Tensor) -> ModuleType:
    """The counting sort. Raises RuntimeError for a CUDA tensor where triton is not installed."""
    return _kernels("gpu.grouped_ops") if wants_kernels(ids) else cpu_experts


def experts(x: Tensor) -> ModuleType:
    """The expert layers; raises as `router`."""
    return _choose(x, "gpu.experts", cpu_experts)


def grouped(x: Tensor) -> ModuleType:
    """Grouped linear layers and the combine; raises as `router`."""
    return _choose(x, "gpu.grouped_ops", cpu_grouped)


def head(features: Tensor) -> ModuleType:
    """The fusion head; raises as `router`."""
    if wants_kernels(features):
        kernels = _kernels("triton_head")
        if kernels.supports(features):
            return kernels
    return cpu_head
