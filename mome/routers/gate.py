"""The linear map from tokens to the logits of experts, as a function and as a module."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn


class LinearGate(nn.Module):
    """l = W x, without a bias.

    Args:
        dim: Width C of the tokens.
        outputs: Number of logits, usually one per expert.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.weight_EC = nn.Parameter(torch.empty(outputs, dim))

    def forward(self, x_TC: Tensor) -> Tensor:
        """Logits (T, E) in float32, whatever the precision of the model."""
        return float32_linear(x_TC, self.weight_EC)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the weights with a normal distribution of the model's `initializer_range`."""
        init.normal_(self.weight_EC, mean=0.0, std=std)


def float32_linear(x_TC: Tensor, weight_EC: Tensor) -> Tensor:
    """x Wᵀ in float32, or in float64 where the tokens are, outside autocast: (T, C) → (T, E).

    In memory the tokens are the last dimension. There are few experts, and on a short last dimension a softmax takes
    twenty times as long.
    """
    with torch.autocast(x_TC.device.type, enabled=False):
        dtype = torch.promote_types(x_TC.dtype, torch.float32)
        return (weight_EC.to(dtype) @ x_TC.to(dtype).t()).t()
