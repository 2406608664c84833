"""A linear head: one 1×1×1 layer over the labels, as in any multi-label network."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.layers.heads.base import Head, prior_logit


class PlainHead(Head):
    """Logits (B, P, V) = w_label · m(v) + b_label (our choice, as a baseline).

    With one-hot text rows this is one output channel per label.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `plain`.

        Args:
            prior: Probability of a voxel before training.
        """

        prior: float = 0.02

    def __init__(self, config: Config, *, channels: int, text_dim: int, bottleneck_channels: int) -> None:
        super().__init__()
        self.bias_start = prior_logit(config.prior)
        self.weight_LC = nn.Parameter(torch.empty(text_dim, channels))
        self.bias_L = nn.Parameter(torch.empty(text_dim))

    def forward(self, mixture_BPCV: Tensor, text_PT: Tensor, bottleneck: Tensor) -> Tensor:
        text_PT = text_PT.to(mixture_BPCV.dtype)
        weight_PC, bias_P = text_PT @ self.weight_LC, text_PT @ self.bias_L
        if mixture_BPCV.shape[1] == 1:
            logits_BPV = torch.einsum("pc,bcv->bpv", weight_PC, mixture_BPCV[:, 0])
        else:
            logits_BPV = torch.einsum("pc,bpcv->bpv", weight_PC, mixture_BPCV)
        return logits_BPV + bias_P[:, None]

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance of the mixture; the bias is the logit of the prior."""
        init.trunc_normal_(self.weight_LC, std=self.weight_LC.shape[1] ** -0.5)
        init.constant_(self.bias_L, self.bias_start)
