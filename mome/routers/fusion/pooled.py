"""One weight per prompt and scale for a whole patch, from the mean of each scale's map and the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mome.registry import at_least
from mome.routers.fusion.base import ABSENT, Fusion
from mome.routers.fusion.text_guided import ScaleScores


class PooledFusion(Fusion):
    """weight(p, s) = softmax over s of ⟨W_q text_p, W_k mean_v f_s(v)⟩ / √d + b_s, the same at every voxel. Our choice.

    The mean is taken over one patch of the batch, so that the group of voxels that share a weight is one patch: the
    other patches of a batch change nothing, but a scan that is cut into tiles of another size gets other weights.
    Tiles of voxels inside `predict` change nothing, because the mean is taken before the split (`summarise`).
    """

    takes_present = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `pooled`.

        Args:
            dim: Width d of queries and keys.
        """

        dim: int = 32

    def __init__(self, config: Config, *, channels: int, text_dim: int, scales: int) -> None:
        super().__init__()
        at_least(1, "fusion pooled", dim=config.dim)
        self.scores = ScaleScores(config.dim, channels=channels, text_dim=text_dim, scales=scales)

    def summarise(self, features_BSCV: Tensor) -> Tensor:
        """The mean (B, S, C) of every map over its voxels, float32 (float64 for maps of float64)."""
        dtype = features_BSCV.dtype if features_BSCV.dtype == torch.float64 else torch.float32
        return features_BSCV.mean(dim=-1, dtype=dtype)

    def forward(
        self,
        features_BSCV: Tensor,
        text_PT: Tensor,
        summary: Tensor | None = None,
        present_PS: Tensor | None = None,
    ) -> Tensor:
        """See `Fusion.forward`.

        Args:
            features_BSCV: The scales at V voxels.
            text_PT: Text rows of the prompts.
            summary: What `summarise` returned for the whole map. Where None, the V voxels are the whole map.
            present_PS: bool, the scales that each prompt has; None where it has all.
        """
        means_BSC = self.summarise(features_BSCV) if summary is None else summary
        weights_BPS = self._weights(means_BSC, text_PT, present_PS).to(features_BSCV.dtype)
        return torch.einsum("bps,bscv->bpcv", weights_BPS, features_BSCV)

    def weights(self, features_BSCV: Tensor, text_PT: Tensor, present_PS: Tensor | None = None) -> Tensor:
        return self._weights(self.summarise(features_BSCV), text_PT, present_PS)[..., None]

    def _weights(self, means_BSC: Tensor, text_PT: Tensor, present_PS: Tensor | None) -> Tensor:
        query_PC, bias_PS = self.scores(text_PT)
        scores_BPS = torch.einsum("pc,bsc->bps", query_PC.to(means_BSC.dtype), means_BSC) + bias_PS
        if present_PS is not None:
            scores_BPS = scores_BPS.masked_fill(~present_PS, ABSENT)
        return scores_BPS.softmax(dim=-1)
