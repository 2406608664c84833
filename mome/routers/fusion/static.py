"""Fusions that look at no voxel: the ablations of the text-guided router."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mome.routers.fusion.weights import FusionWeights


class UniformFusion(nn.Module):
    """Every scale weighs 1/S."""

    finest_only = False
    prompt_dependent = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.channels, self.scales = channels, scales

    def forward(self, text_PT: Tensor) -> FusionWeights:
        prompts = text_PT.shape[0]
        return FusionWeights(text_PT.new_zeros(prompts, self.channels), text_PT.new_zeros(prompts, self.scales), 0)


class LastFusion(UniformFusion):
    """The finest scale alone, as in the CLIP-Driven Universal Model; coarser scales get no expert at all."""

    finest_only = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to set."""


class LearnedFusion(UniformFusion):
    """Weights that a prompt learns over the scales, the same at every voxel."""

    prompt_dependent = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__(config, channels=channels, text_dim=text_dim, scales=scales)
        self.score = nn.Linear(text_dim, scales)

    def forward(self, text_PT: Tensor) -> FusionWeights:
        return FusionWeights(text_PT.new_zeros(text_PT.shape[0], self.channels), self.score(text_PT), 0)
