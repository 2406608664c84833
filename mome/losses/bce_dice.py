"""Binary cross entropy + soft Dice over the structures that are annotated in each case.

The sum of both and the mask are those of the CLIP-Driven Universal Model (Liu et al. 2023). Dice is computed over whole
patches, pooled over the batch (nnU-Net's `batch_dice`), never per slice; that is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def _sum_over_processes(x: Tensor) -> Tensor:
    """Sums over all processes, differentiably, so that the loss does not depend on how the batch is shared out."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(x)
    return x


def masked_bce_dice(
    logits: Tensor,
    targets: Tensor,
    supervised_BP: Tensor | None = None,
    *,
    bce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
    positive_weight: float = 1.0,
) -> Tensor:
    """Returns a scalar loss. A structure that is not annotated adds neither value nor gradient.

    Args:
        logits, targets: (B, P, D, H, W).
        supervised_BP: True where prompt p is annotated in case b; None means that all are.
        bce_weight, dice_weight: Weights of the two terms.
        smooth: Voxels added to numerator and denominator of Dice, so that an absent structure has a small gradient.
        positive_weight: Weight of a structure's voxels in the cross entropy. The voxels of a small structure are one in
            a thousand; without the weight its logits fall until Dice has no gradient left.
    """
    logits, targets = logits.float().flatten(2), targets.flatten(2).to(torch.float32)
    if supervised_BP is None:
        supervised_BP = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    mask_BP = supervised_BP.to(logits.dtype)

    weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
    bce_BP = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none").mean(-1)
    bce_sums = _sum_over_processes(torch.stack([(bce_BP * mask_BP).sum(), mask_BP.sum()]))
    bce = bce_sums[0] / bce_sums[1].detach().clamp(min=1)

    probability = logits.sigmoid()
    intersection_P = ((probability * targets).sum(-1) * mask_BP).sum(0)
    cardinality_P = ((probability.sum(-1) + targets.sum(-1)) * mask_BP).sum(0)
    sums = _sum_over_processes(torch.stack([intersection_P, cardinality_P, mask_BP.sum(0)]))
    dice_P = (2 * sums[0] + smooth) / (sums[1] + smooth)
    present_P = (sums[2].detach() > 0).to(dice_P.dtype)
    dice = ((1 - dice_P) * present_P).sum() / present_P.sum().clamp(min=1)
    return bce_weight * bce + dice_weight * dice


class BCEDiceLoss(nn.Module):
    """The weighted sum of cross entropy and soft Dice, `masked_bce_dice` (our choice).

    Dice is 2 Σ p·t / (Σ p + Σ t) with `smooth` added to numerator and denominator. V-Net (Milletari et al. 2016,
    arXiv 1606.04797) squares the terms of the denominator.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `bce_dice`.

        Args:
            bce_weight: Weight of the cross entropy.
            dice_weight: Weight of the Dice loss.
            smooth: Added to numerator and denominator of Dice, in voxels.
            positive_weight: Weight of voxels inside a structure in the cross entropy; those outside weigh one.
        """

        bce_weight: float = 1.0
        dice_weight: float = 1.0
        smooth: float = 1.0
        positive_weight: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        config = self.config
        return masked_bce_dice(
            logits,
            targets,
            supervised_BP,
            bce_weight=config.bce_weight,
            dice_weight=config.dice_weight,
            smooth=config.smooth,
            positive_weight=config.positive_weight,
        )
