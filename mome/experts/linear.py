"""One linear layer per expert: with n = 1, the plain reading of the paper's decoder-layer experts."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from mome_kernels import moe_linear
from torch import Tensor, nn

from mome.experts.base import TokenExperts
from mome.registry import at_least


class LinearExperts(TokenExperts):
    """y = W_e x + b_e. That a decoder layer is one linear layer of a scale is our choice."""

    dense_when_single = True
    stacked = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `linear`.

        Args:
            n: Number of experts.
        """

        n: int = 1

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "linear experts", n=config.n)
        self.num_experts = config.n
        self.weight_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.bias_ED = nn.Parameter(torch.empty(config.n, dim))

    def forward(self, x_TD: Tensor, ids_TK: Tensor | None, weights_TK: Tensor | None) -> Tensor:
        if ids_TK is None or weights_TK is None:
            return nn.functional.linear(x_TD, self.weight_EDD[0], self.bias_ED[0])
        return moe_linear(x_TD, ids_TK, weights_TK, self.weight_EDD, self.bias_ED)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance of the tokens."""
        init.trunc_normal_(self.weight_EDD, std=self.weight_EDD.shape[-1] ** -0.5)
        init.zeros_(self.bias_ED)
