"""Tensor descriptors, through which the copy engine of newer NVIDIA devices (TMA) reads blocks of a tensor.

Whether a tensor can be described depends on its shape, its address and the device. Kernels read other tensors through
pointers, with the same results.
"""

from __future__ import annotations

import math

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Machine


def describable(tensor: Tensor, machine: Machine) -> bool:
    """Whether TMA can read a contiguous tensor: compute capability 9, base and rows at multiples of 16 bytes."""
    if not machine.arch.startswith("sm_") or int(machine.arch[3:]) < 90 or tensor.numel() == 0:
        return False
    return tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0


def describe(tensor: Tensor, block: tuple[int, ...], machine: Machine) -> Tensor | TensorDescriptor:
    """A descriptor with blocks of this shape, or the tensor itself where it cannot be described.

    Triton divides a block into the boxes that the hardware supports: at most 256 long, and 128 bytes along the rows.
    """
    if not describable(tensor, machine):
        return tensor
    shape = list(tensor.shape)
    strides = [
        math.prod(shape[i + 1 :]) for i in range(len(shape))
    ]  # PyTorch's own are arbitrary where a length is one
    return TensorDescriptor(tensor, shape, strides, list(block))
