"""Deep supervision: coarse maps of the network are compared with the targets, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mome.errors import InputError
from mome.registry import LOSSES, part


class DeepSupervision(nn.Module):
    """Σ_k w_k · loss_k with w_k ∝ decay^k and Σ w_k = 1; k = 0 are the fused logits, k > 0 those of coarser scales.

    The idea is that of deeply-supervised nets (Lee et al. 2015, arXiv 1409.5185); nnU-Net (Isensee et al. 2021) halves
    the weight from scale to scale. A coarse voxel belongs to a structure that covers at least half of it (our choice).
    The logits of a scale are made by the same head from the map of that scale alone, and only in training.

    Attributes:
        reads_scales: The model gives the logits of its coarser scales in training.
    """

    reads_scales: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `deep_supervision`.

        Args:
            loss: The loss that is computed at every scale.
            decay: Weight of a scale relative to that of the next finer one.
            scales: Largest number of coarser scales, counted from the finest of them.
        """

        loss: Any = part("losses", "bce_dice")
        decay: float = 0.5
        scales: int = 3

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not 0 < config.decay <= 1 or config.scales < 1:
            raise InputError(
                "loss deep_supervision has a decay above 0 and at most 1, and at least one scale, got "
                f"{config.decay:g} and {config.scales}",
                hint="deep_supervision(loss=bce_dice, decay=0.5, scales=3)",
            )
        self.loss = LOSSES.build(config.loss)
        if getattr(self.loss, "reads_scales", False):
            raise InputError("loss deep_supervision stands once", hint="deep_supervision(loss=bce_dice)")
        self.decay, self.scales = config.decay, config.scales

    def forward(
        self, logits: Tensor | Sequence[Tensor], targets: Tensor, supervised_BP: Tensor | None = None
    ) -> Tensor:
        """Compares one or several maps of logits with the targets.

        Args:
            logits: (B, P, D, H, W), or several from fine to coarse, whose sides divide those of the first.
            targets: (B, P, D, H, W) at the resolution of the first.
            supervised_BP: True where prompt p is annotated in case b; None means that all are.
        """
        maps = [logits] if isinstance(logits, Tensor) else list(logits)[: self.scales + 1]
        weights = [self.decay**k for k in range(len(maps))]
        terms = [
            weight / sum(weights) * self.loss(scale, coarse_targets(targets, scale.shape[2:]), supervised_BP)
            for weight, scale in zip(weights, maps, strict=True)
        ]
        return sum(terms[1:], terms[0])


def coarse_targets(targets: Tensor, size: Sequence[int]) -> Tensor:
    """Returns the targets at a coarser resolution: 1 where a structure covers at least half of a coarse voxel.

    Args:
        targets: (B, P, D, H, W), 0 or 1.
        size: Coarse voxels (D, H, W); they divide the sides of the targets.
    """
    if tuple(targets.shape[2:]) == tuple(size):
        return targets
    steps = [fine // coarse for fine, coarse in zip(targets.shape[2:], size, strict=True)]
    return (F.avg_pool3d(targets.float(), steps, steps) >= 0.5).to(targets.dtype)
