"""Binary cross entropy + soft Dice over the structures that are annotated in each case.

The sum of both and the mask are those of the CLIP-Driven Universal Model (Liu et al. 2023). Dice is computed over whole
patches, pooled over the batch (nnU-Net's `batch_dice`), never per slice; that is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.losses.masked import mean_over_annotated, mean_over_present, sum_over_processes
from mome.losses.row_sums import row_sums


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
    sums = row_sums(logits.flatten(2), targets.flatten(2), positive_weight)
    mask_BP = torch.ones_like(sums.target) if supervised_BP is None else supervised_BP.to(sums.target.dtype)
    bce = mean_over_annotated(sums.cross_entropy / logits[0, 0].numel(), mask_BP)
    pooled_BP = (sums.both * mask_BP, sums.probability * mask_BP, sums.target * mask_BP, mask_BP)
    both_P, p_P, t_P, annotated_P = sum_over_processes(torch.stack([each_BP.sum(0) for each_BP in pooled_BP]))
    present_P = (annotated_P.detach() > 0).to(annotated_P.dtype)
    dice = mean_over_present(1 - (2 * both_P + smooth) / (p_P + t_P + smooth), present_P)
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
        if min(config.bce_weight, config.dice_weight) < 0 or config.bce_weight + config.dice_weight == 0:
            raise InputError(
                "loss bce_dice has two weights of at least 0, not both 0, got bce_weight "
                f"{config.bce_weight:g} and dice_weight {config.dice_weight:g}",
                hint="bce_dice(bce_weight=1.0, dice_weight=1.0)",
            )
        if min(config.smooth, config.positive_weight) <= 0:  # without smoothing, an absent structure divides 0 by 0
            raise InputError(
                f"loss bce_dice has smooth and positive_weight above 0, got {config.smooth:g} and "
                f"{config.positive_weight:g}",
                hint="bce_dice(smooth=1.0, positive_weight=5.0)",
            )
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
