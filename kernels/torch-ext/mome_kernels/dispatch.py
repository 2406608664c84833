"""Which implementation runs on a tensor's device."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import cpu_experts, cpu_head


def experts(x: Tensor) -> ModuleType:
    """The expert layers for `x.device`; the blocked loop of torch ops is right on every device."""
    return cpu_experts


def head(features: Tensor) -> ModuleType:
    """The fusion head for `features.device`."""
    return cpu_head
