"""Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome.errors import InputError
from mome.losses.masked import masked, mean_over_annotated


class FocalLoss(nn.Module):
    """−α (1 − p)^γ log p for voxels inside, −(1 − α) p^γ log(1 − p) for those outside.

    Lin et al. divide by the number of positive anchors; here it is the mean over the voxels of annotated structures,
    which is our choice: a patch may hold no voxel of a structure.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `focal`.

        Args:
            gamma: Exponent γ; 0 is the cross entropy.
            alpha: Weight α of voxels inside, above 0 and below 1. None weighs all voxels 1.
        """

        gamma: float = 2.0
        alpha: float | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        # At 0 the voxels inside would weigh nothing, at 1 those outside.
        if config.gamma < 0 or (config.alpha is not None and not 0 < config.alpha < 1):
            raise InputError(
                f"loss focal has gamma from 0 and alpha above 0 and below 1, got {config.gamma:g} and {config.alpha}",
                hint="focal(gamma=2.0, alpha=0.25)",
            )
        self.gamma, self.alpha = config.gamma, config.alpha

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        data = masked(logits, targets, supervised_BP)
        signed_BPV = torch.where(data.targets_BPV > 0.5, data.logits_BPV, -data.logits_BPV)
        loss_BPV = -F.logsigmoid(signed_BPV)
        if self.gamma:
            # p^γ as exp(γ log p): the slope of the power at p = 0 is infinite below γ = 1.
            loss_BPV = loss_BPV * (self.gamma * F.logsigmoid(-signed_BPV)).exp()
        if self.alpha is not None:
            loss_BPV = loss_BPV * torch.where(data.targets_BPV > 0.5, self.alpha, 1 - self.alpha)
        return mean_over_annotated(loss_BPV.mean(-1), data.mask_BP)
