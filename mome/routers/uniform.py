"""Every token goes to every expert: the dense mean of all experts, which learns no routing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.map_context import MapContext
from mome.routers.base import Router
from mome.routers.routing import TokenChoice, count_assignments


class UniformRouter(Router):
    """y = (1/E) · Σ_e f_e(x) (our choice, as a baseline). Every expert runs on every token."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`uniform` has no settings."""

    def __init__(self, config: Config, *, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> TokenChoice:
        device = x_BDHWC.device
        ids_TE = torch.arange(self.num_experts, device=device).repeat(x_BDHWC[..., 0].numel(), 1)
        counts_E = count_assignments(ids_TE, self.num_experts)
        weights_TE = torch.full(ids_TE.shape, 1 / self.num_experts, dtype=torch.float32, device=device)
        return TokenChoice(counts_E, ids_TK=ids_TE, weights_TK=weights_TE)
