"""Independent gates: every scale is let through or held back by itself, voxel by voxel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mome.registry import at_least
from mome.routers.fusion.base import Fusion
from mome.routers.fusion.text_guided import ScaleScores


class GatedFusion(Fusion):
    """mixture(p, v) = Σ_s g(p, v, s) · f_s(v) with g = sigmoid(⟨W_q text_p, W_k f_s(v)⟩ / √d + b_s). Our choice.

    The gates do not compete, so they need not sum to one: a voxel may keep every scale, or none. The biases start at
    −log(S − 1), at which the gates sum to one.
    """

    takes_present = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `gated`.

        Args:
            dim: Width d of queries and keys.
        """

        dim: int = 32

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        at_least(1, "fusion gated", dim=config.dim)
        self.scores = ScaleScores(config.dim, channels=channels, text_dim=text_dim, scales=scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        gates_BPSV = self.weights(features_BSCV, text_PT, present_PS)
        return torch.einsum("bpsv,bscv->bpcv", gates_BPSV, features_BSCV)

    def weights(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        query_PC, bias_PS = self.scores(text_PT)
        scores_BPSV = torch.einsum("pc,bscv->bpsv", query_PC.to(features_BSCV.dtype), features_BSCV)
        gates_BPSV = (scores_BPSV + bias_PS[..., None]).sigmoid()
        return gates_BPSV if present_PS is None else gates_BPSV * present_PS[..., None]

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """The gates start near 1/S; `ScaleScores` has filled the rest."""
        init.constant_(self.scores.bias_S, -math.log(max(self.scores.bias_S.shape[0] - 1, 1)))
