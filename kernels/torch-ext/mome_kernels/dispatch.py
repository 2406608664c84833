"""Chooses the implementation of an op by its tensor's device and dtype.

CUDA and ROCm tensors run the Triton kernels of `gpu/` in the dtypes that tensor cores support. Everything else runs the
torch code of `torch_impl/`: CPU tensors, float64 on every device, and GPUs before Ampere. With `TRITON_INTERPRET=1` the
kernels run on the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from . import torch_impl
from .weights import HeadWeights

# Read once, since Triton reads it when a kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()  # entering it takes no time
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_compiles_head: ContextVar[bool] = ContextVar("compiles_head", default=False)


@torch.compiler.assume_constant_result  # `moe_mlp` calls this while it is traced
def _has_tensor_cores(device: torch.device) -> bool:
    """Ampere or later, or any ROCm device; older ones lack bfloat16 and the shared memory that the tiles need."""
    if torch.version.hip is not None:
        return True
    try:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    except (RuntimeError, AssertionError):  # no GPU here, or torch without CUDA: the tensor is a fake
        return True


def wants_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels support the tensor's device."""
    if x.device.type == "cuda":
        return _has_tensor_cores(x.device)
    return x.device.type == "cpu" and _INTERPRETED


def op_context(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes the tensor's device the current one and disables autocast while the body of an op runs.

    Triton launches on the current device, which may differ from the tensor's. Autocast would round what an op sums in
    float32.
    """
    device = x.device
    casts = torch.is_autocast_enabled(device.type)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return torch.autocast(device.type, enabled=False) if casts else _NOTHING
    return _elsewhere(device, casts)


@contextlib.contextmanager
def _elsewhere(device: torch.device, casts: bool) -> Iterator[None]:
    with torch.cuda.device(device), torch.autocast(device.type, enabled=False) if casts else _NOTHING:
        yield


def _kernels(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".gpu.{name}", __package__)
    except ImportError as error:
        raise RuntimeError(
            "the GPU kernels of mome need triton, which cannot be imported\n  try: pip install triton"
        ) from error


def runs_kernels(x: Tensor) -> bool:
    """Whether the expert layers of a tensor's device and dtype run as Triton kernels."""
    return wants_kernels(x) and x.dtype in _KERNEL_DTYPES


def _choose(x: Tensor, name: str, torch_module: ModuleType) -> ModuleType:
    return _kernels(name) if runs_kernels(x) else torch_module


def routing(ids: Tensor) -> ModuleType:
    """The module with `route`. Raises RuntimeError for a CUDA tensor where triton is not installed."""
    return _kernels("grouped") if wants_kernels(ids) else torch_impl.routing


def experts(x: Tensor) -> ModuleType:
    """The module of the expert layers; raises RuntimeError like `routing`."""
    return _choose(x, "experts", torch_impl.experts)


def grouped(x: Tensor) -> ModuleType:
    """The module of the grouped linear layers and `combine`; raises RuntimeError like `routing`."""
    return _choose(x, "grouped", torch_impl.grouped)


@contextlib.contextmanager
def compiled_head() -> Iterator[None]:
    """Lets the fusion head on the CPU run as a loop that torch compiles; heads that the loop lacks run as before."""
    before = _compiles_head.set(True)
    try:
        yield
    finally:
        _compiles_head.reset(before)


def head(features: Tensor, weights: HeadWeights) -> ModuleType:
    """The module of the fusion head; raises RuntimeError like `routing`."""
    if wants_kernels(features):
        kernels = _kernels("head")
        if kernels.supports(features):
            return kernels
    if _compiles_head.get() and torch_impl.head_compiled.supports(features, weights):
        return torch_impl.head_compiled
    return torch_impl.head
