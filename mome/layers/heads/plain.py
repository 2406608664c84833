"""The head without text: one 1×1×1 layer over the labels, as in any multi-label network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.layers.heads.prior import check_prior
from mome.routers.fusion.weights import FusionWeights


class PlainHead(nn.Module):
    """Logits (B, P, V) = w_label · m(v) + b_label; prompts are one-hot rows over the labels."""

    uses_text = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Prior probability of a voxel."""

        prior: float = 0.02

    def __init__(self, config: Config, *, channels: int, text_dim: int, bottleneck_channels: int) -> None:
        super().__init__()
        check_prior(config.prior)
        self.prior = config.prior
        self.weight_LC = nn.Parameter(torch.empty(text_dim, channels))
        self.bias_L = nn.Parameter(torch.empty(text_dim))

    def forward(self, features_BSCV: Tensor, text_PT: Tensor, bottleneck: Tensor, fusion: FusionWeights) -> Tensor:
        mixture_BCV = features_BSCV.mean(dim=1)  # the fusions allowed here weigh every scale alike
        text_PT = text_PT.to(mixture_BCV.dtype)
        weight_PC, bias_P = text_PT @ self.weight_LC, text_PT @ self.bias_L
        return torch.einsum("pc,bcv->bpv", weight_PC, mixture_BCV) + bias_P[:, None]

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        init.trunc_normal_(self.weight_LC, std=self.weight_LC.shape[1] ** -0.5)
        init.constant_(self.bias_L, math.log(self.prior / (1 - self.prior)))
