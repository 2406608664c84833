"""Activations that write into a given buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def activate(z_nF: Tensor, activation: str, out: Tensor) -> Tensor:
    """Writes a(z) into `out`, which may be z itself, and returns it; without an activation it returns z."""
    if activation == "silu":
        return torch.ops.aten.silu.out(z_nF, out=out)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(z_nF, approximate=_approximation(activation), out=out)
    return torch.clamp_min(z_nF, 0, out=out) if activation == "relu" else z_nF


def activate_backward(grad_nF: Tensor, z_nF: Tensor, activation: str) -> Tensor:
    """Replaces the gradient by grad · a'(z)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad_nF, z_nF, grad_input=grad_nF)
    if activation in ("gelu", "gelu_tanh"):
        approximate = _approximation(activation)
        return torch.ops.aten.gelu_backward.grad_input(grad_nF, z_nF, approximate=approximate, grad_input=grad_nF)
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad_nF, z_nF, 0, grad_input=grad_nF)
    return grad_nF


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
