"""The linear map from tokens to the logits of experts."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from mome.routers.linear_router import float32_linear


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
