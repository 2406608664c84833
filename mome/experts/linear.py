"""One linear layer per expert: with n = 1, the plain reading of the paper's decoder-layer experts."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from mome_kernels import moe_linear
from torch import Tensor, nn

from mome.registry import at_least
from mome.routers.routing import Routing


class LinearExperts(nn.Module):
    """y = W_e x + b_e."""

    token_local = True
    residual = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Number of experts."""

        n: int = 1

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "linear experts", n=config.n)
        self.num_experts = config.n
        self.weight_EDD = nn.Parameter(torch.empty(config.n, dim, dim))
        self.bias_ED = nn.Parameter(torch.empty(config.n, dim))

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:
            return nn.functional.linear(x_TD, self.weight_EDD[0], self.bias_ED[0])
        return moe_linear(x_TD, routing.expert_ids_TK, routing.weights_TK, self.weight_EDD, self.bias_ED)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        init.trunc_normal_(self.weight_EDD, std=self.weight_EDD.shape[-1] ** -0.5)
        init.zeros_(self.bias_ED)
