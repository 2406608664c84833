"""Fusions that look at no voxel: the ablations of the text-guided router."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mome.routers.fusion.base import DotProduct, Fusion, mix_by_dot_product


class UniformFusion(Fusion):
    """Every scale weighs 1/S (our choice, as a baseline)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`uniform` has no settings."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.channels, self.scales = channels, scales

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return features_BSCV.mean(dim=1)[:, None]

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        prompts = text_PT.shape[0]
        return DotProduct(text_PT.new_zeros(prompts, self.channels), text_PT.new_zeros(prompts, self.scales))


class LastFusion(Fusion):
    """The finest scale alone; coarser scales get no expert.

    The CLIP-Driven Universal Model (Liu et al. 2023, arXiv 2301.00785) uses its finest map so.
    """

    finest_only = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`last` has no settings."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return features_BSCV[:, -1:].contiguous()  # voxels last in memory, as every other fusion returns them

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        prompts = text_PT.shape[0]
        return DotProduct(text_PT.new_zeros(prompts, self.channels), text_PT.new_zeros(prompts, 1))


class LearnedFusion(Fusion):
    """Weights over the scales that are learned for each prompt and are the same at every voxel (our choice)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`learned` has no settings."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.channels = channels
        self.score = nn.Linear(text_dim, scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return mix_by_dot_product(features_BSCV, self.dot_product(text_PT))

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        return DotProduct(text_PT.new_zeros(text_PT.shape[0], self.channels), self.score(text_PT))
