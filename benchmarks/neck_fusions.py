"""Fusions of `neck_study.py` that are no part of mome: one without text, and other starts of the text-guided one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mome.registry import FUSIONS
from mome.routers.fusion.base import DotProduct, Fusion, mix_by_dot_product
from mome.routers.fusion.text_guided import ScaleScores, TextGuidedFusion


class VoxelFusion(Fusion):
    """The weights of `text_guided` with one learned query for all prompts: the voxel alone decides. Our choice."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`voxel` has no settings."""

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        self.scores = StartedScores(StartedFusion.Config(start="random"), channels=channels, text_dim=1, scales=scales)

    def forward(self, features_BSCV: Tensor, text_PT: Tensor) -> Tensor:
        return mix_by_dot_product(features_BSCV, self.dot_product(text_PT))

    def dot_product(self, text_PT: Tensor) -> DotProduct:
        query_PC, bias_PS = self.scores(text_PT.new_ones(text_PT.shape[0], 1))
        return DotProduct(query_PC, bias_PS, 0)


class StartedFusion(TextGuidedFusion):
    """`text_guided` with another start, and with another learning rate for the projection of the text. Our choice."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TextGuidedFusion.Config):
        """Settings of `started`.

        Args:
            start: `uniform` begins with queries of zero, so that all scales weigh alike, nearly as `text_guided` does;
                `common` with one random query for all prompts, as `voxel` does; `random` with a random query per
                prompt, as `text_guided` did when the study was made.
            slow: Whether W_q has the lower learning rate of `text_guided`, which it did not have then.
        """

        start: str = "uniform"
        slow: bool = False

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__(config, channels=channels, text_dim=text_dim, scales=scales)
        if config.start not in ("uniform", "common", "random"):
            raise ValueError(f"start is uniform, common or random, not {config.start}")
        self.scores = StartedScores(config, channels=channels, text_dim=text_dim, scales=scales)


class StartedScores(ScaleScores):
    """The scores of `StartedFusion`."""

    def __init__(self, config: StartedFusion.Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__(config.dim, channels=channels, text_dim=text_dim, scales=scales)
        self.start, self.slow = config.start, config.slow

    def rate_factors(self) -> dict[Tensor, float]:
        """Returns the factors of the learning rates that are not one."""
        return super().rate_factors() if self.slow else {}

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the queries; see `StartedFusion.Config`."""
        super().init_weights_(init, std)
        init.zeros_(self.query.weight)
        if self.start == "random":
            init.trunc_normal_(self.query.weight, std=self.query.weight.shape[1] ** -0.5)
        if self.start == "common":
            init.trunc_normal_(self.query.bias, std=1.0)


def register_fusions() -> None:
    """Makes the fusions known by name, for training and for reading the models."""
    FUSIONS.register("voxel", VoxelFusion, summary="one learned query for all prompts")
    FUSIONS.register("started", StartedFusion, summary="text_guided with another start")
