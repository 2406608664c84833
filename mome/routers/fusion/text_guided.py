"""The paper's text-guided router: voxel-wise fusion of the decoder-layer experts (arXiv 2510.26996).

That text guides a voxel-wise fusion across scales is the paper's; the form of the score, a scaled dot product
with a bias per scale, is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import at_least
from mome.routers.fusion.weights import FusionWeights


class TextGuidedFusion(nn.Module):
    """weight(p, v, s) = softmax over s of ⟨W_q text_p, W_k f_s(v)⟩ / √d + b_s."""

    finest_only = False
    prompt_dependent = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Width d of queries and keys; how many scales a voxel keeps (0: all of them)."""

        dim: int = 32
        top_k: int = 0

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        if not 0 <= config.top_k <= scales:
            raise InputError(
                f"fusion text_guided keeps top_k={config.top_k} of {scales} scales",
                hint=f"use a top_k from 0 (all) to {scales}",
            )
        at_least(1, "fusion text_guided", dim=config.dim)
        self.top_k = config.top_k
        self.query = nn.Linear(text_dim, config.dim)
        self.key = nn.Linear(channels, config.dim, bias=False)
        self.scale_bias_S = nn.Parameter(torch.empty(scales))

    def forward(self, text_PT: Tensor) -> FusionWeights:
        # The key projection is linear, so it moves to the query's side: ⟨q, W_k f⟩ = ⟨W_kᵀ q, f⟩.
        query_PC = self.query(text_PT) @ self.key.weight * self.key.weight.shape[0] ** -0.5
        return FusionWeights(query_PC, self.scale_bias_S.expand(text_PT.shape[0], -1), self.top_k)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        init.trunc_normal_(self.query.weight, std=self.query.weight.shape[1] ** -0.5)
        init.trunc_normal_(self.key.weight, std=self.key.weight.shape[1] ** -0.5)
        init.zeros_(self.scale_bias_S)
