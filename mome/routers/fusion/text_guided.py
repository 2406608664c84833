"""The paper's text-guided router: voxel-wise fusion of the decoder-layer experts (arXiv 2510.26996).

The paper says that text guides a voxel-wise fusion across scales. The form of the score, a scaled dot product with a
bias per scale, is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.registry import at_least
from mome.routers.fusion.base import DotProduct, Fusion, mix_by_dot_product

_FIRST_QUERY = 0.02  # standard deviation of a new model's queries, for text rows of numbers of unit size


class TextGuidedFusion(Fusion):
    """weight(p, v, s) = softmax over s of ⟨W_q text_p, W_k f_s(v)⟩ / √d + b_s.

    That text guides a voxel-wise fusion is the paper's (arXiv 2510.26996); this form of the score is our choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `text_guided`.

        Args:
            dim: Width d of queries and keys.
            top_k: The number of scales that a voxel keeps; 0 keeps all.
        """

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
        self.scores = ScaleScores(config.dim, channels=channels, text_dim=text_dim, scales=scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return mix_by_dot_product(features_BSCV, self.dot_product(text_PT))

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        query_PC, bias_PS = self.scores(text_PT)
        return DotProduct(query_PC, bias_PS, self.top_k)


class ScaleScores(nn.Module):
    """Text rows (P, T) → queries (P, C) in the space of the features, and biases (P, S).

    All scales weigh nearly alike at first, and text moves the queries slowly (our choice;
    benchmarks/results/neck_study.md).
    """

    def __init__(self, dim: int, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.query = nn.Linear(text_dim, dim)
        self.key = KeyProjection(dim, channels)
        self.bias_S = nn.Parameter(torch.empty(scales))

    def forward(self, text_PT: Tensor) -> tuple[Tensor, Tensor]:
        query_PC = self.key(self.query(text_PT))
        return query_PC, self.bias_S.expand(text_PT.shape[0], -1)

    def rate_factors(self) -> dict[Tensor, float]:
        """Returns 1/√T for W_q; see `mome.training.optimizer.part_factors`.

        A step of AdamW moves every weight by about the learning rate, whatever its gradient, so that a row of T numbers
        of unit size moves a query by up to T times the rate. Queries then grew until the softmax kept one scale.
        """
        return {self.query.weight: self.query.weight.shape[1] ** -0.5}

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Starts with small queries and the same bias for every scale; keys keep their variance."""
        # Not zero, since keys would have no gradient in the first step.
        init.trunc_normal_(self.query.weight, std=_FIRST_QUERY * self.query.weight.shape[1] ** -0.5)
        init.zeros_(self.query.bias)
        init.trunc_normal_(self.key.weight_DC, std=self.key.weight_DC.shape[1] ** -0.5)
        init.zeros_(self.bias_S)


class KeyProjection(nn.Module):
    """The key projection W_k, applied to the query: ⟨q, W_k f⟩ = ⟨W_kᵀ q, f⟩, so that no key is made per voxel."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        # made through nn.Linear so that a seed gives the same weights as in earlier versions
        self.weight_DC = nn.Linear(channels, dim, bias=False).weight

    def forward(self, query_PD: Tensor) -> Tensor:
        return query_PD @ self.weight_DC * self.weight_DC.shape[0] ** -0.5

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the weights as those of any linear layer; `ScaleScores` scales them afterwards."""
        init.normal_(self.weight_DC, mean=0.0, std=std)
