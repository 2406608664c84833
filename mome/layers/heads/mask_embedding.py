"""The text row as an embedding of its mask: the logit of a voxel is an inner product."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from mome.layers.heads.base import Head, prior_logit
from mome.registry import at_least


class MaskEmbeddingHead(Head):
    """Logits (B, P, V) = ⟨W text_p, m_p(v)⟩ / √C + b.

    The inner product of mask embeddings and voxels is MaskFormer's (Cheng et al. 2021, arXiv 2107.06278) and
    VoxTell's (arXiv 2511.11450); there W is a small network, which `hidden` asks for. The factor 1/√C and the bias,
    which starts at the logit of the prior, are our choice. Without a third layer, and without a φ between, this is no
    case of the fused op's head, so it runs in tiles of voxels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `mask_embedding`.

        Args:
            hidden: Width of the hidden layers of W; 0 makes W linear.
            depth: The number of hidden layers, where `hidden` is not 0; MaskFormer has 2.
            prior: Probability of a voxel before training.
        """

        hidden: int = 0
        depth: int = 2
        prior: float = 0.02

    def __init__(self, config: Config, *, channels: int, text_dim: int, bottleneck_channels: int) -> None:
        super().__init__()
        at_least(0, "head mask_embedding", hidden=config.hidden)
        at_least(1, "head mask_embedding", depth=config.depth)
        self.bias_start = prior_logit(config.prior)
        widths = [text_dim, *([config.hidden] * config.depth if config.hidden else []), channels]
        self.embed = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.bias = nn.Parameter(torch.empty(()))

    def forward(self, mixture_BPCV: Tensor, text_PT: Tensor, bottleneck: Tensor) -> Tensor:
        x = text_PT
        for index, layer in enumerate(self.embed):
            x = layer(x.relu() if index else x)
        embedding_PC = x.to(mixture_BPCV.dtype) * x.shape[1] ** -0.5
        if mixture_BPCV.shape[1] == 1:
            logits_BPV = torch.einsum("pc,bcv->bpv", embedding_PC, mixture_BPCV[:, 0])
        else:
            logits_BPV = torch.einsum("pc,bpcv->bpv", embedding_PC, mixture_BPCV)
        return logits_BPV + self.bias

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Keeps the variance through W; the bias is the logit of the prior."""
        for index, layer in enumerate(cast("list[nn.Linear]", list(self.embed))):
            gain = 2.0 if index else 1.0  # a ReLU halves the second moment of what it is given
            init.trunc_normal_(layer.weight, std=(gain / layer.in_features) ** 0.5)
        init.constant_(self.bias, self.bias_start)
