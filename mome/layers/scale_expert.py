"""One decoder layer as an expert: project its map, run the expert body, bring it to the head's width."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.layers.moe import MixtureOfExperts
from mome.routers.routing import Routing


class ScaleExpert(nn.Module):
    """GroupNorm → ReLU → 1×1×1 to `dim` → expert body at the scale's own resolution → 1×1×1 to the head width.

    Decoder layers as experts are the paper's (arXiv 2510.26996); what stands inside is our choice.

    Args:
        in_channels: Channels C_s of the decoder map.
        dim: Width of the tokens that the experts see.
        head_channels: Width C of the head.
        experts, router: Specs, see `mome.layers.moe`.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dim: int,
        head_channels: int,
        experts: str | dict[str, Any],
        router: str | dict[str, Any],
    ) -> None:
        super().__init__()
        groups = next(g for g in (16, 8, 4, 2, 1) if in_channels % g == 0)
        self.norm = nn.GroupNorm(groups, in_channels)
        self.inner = nn.Linear(in_channels, dim)
        self.body = MixtureOfExperts(experts, router, dim=dim)
        self.outer = nn.Linear(dim, head_channels)

    def forward(self, map_BCDHW: Tensor) -> tuple[Tensor, Routing | None]:
        """Map (B, C_s, D_s, H_s, W_s) → feature (B, C, D_s, H_s, W_s), and how its tokens were routed."""
        x = self.norm(map_BCDHW).relu().movedim(1, -1)  # (B, D_s, H_s, W_s, C_s)
        tokens_TD = self.inner(x).flatten(0, 3)
        tokens_TD, routing = self.body(tokens_TD)
        return self.outer(tokens_TD).unflatten(0, x.shape[:4]).movedim(-1, 1), routing

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        for layer in (self.inner, self.outer):
            init.trunc_normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
