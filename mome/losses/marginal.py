"""Marginal and exclusion loss for partially labelled data (Shi et al. 2021, arXiv 2007.03868).

Prompts are taken to exclude each other: a softmax over them and a background whose logit is 0. In a case, the
background and the structures that are not annotated there are merged into one class, because a voxel that no annotated
structure claims may be any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.losses.masked import masked, mean_over_annotated


class MarginalLoss(nn.Module):
    """Cross entropy of merged classes, and a penalty for unannotated structures where an annotated one is.

    The form is that of Shi et al. 2021 (arXiv 2007.03868), with a mean probability in place of their Dice penalty.

    The paper adds Dice losses of the same kind; here they are left to `weighted_sum`. A structure that is not annotated
    does get a gradient: through the merged class, and through the exclusion.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `marginal`.

        Args:
            exclusion: Weight of the penalty.
        """

        exclusion: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.exclusion < 0:
            raise InputError(f"loss marginal has an exclusion of at least 0, got {config.exclusion:g}")
        self.exclusion = config.exclusion

    def forward(self, logits: Tensor, targets: Tensor, supervised_BP: Tensor | None = None) -> Tensor:
        data = masked(logits, targets, supervised_BP)
        annotated_BP1 = data.mask_BP[..., None] > 0
        inside_BPV = (data.targets_BPV > 0.5) & annotated_BP1
        background_B1V = torch.zeros_like(data.logits_BPV[:, :1])
        all_BPV = torch.cat([background_B1V, data.logits_BPV], dim=1)
        log_total_BV = all_BPV.logsumexp(1)
        merged_BPV = torch.cat([background_B1V, data.logits_BPV.masked_fill(annotated_BP1, -torch.inf)], dim=1)
        # A voxel of several annotated structures counts for each of them equally.
        claims_BV = inside_BPV.sum(1)
        own_BV = (data.logits_BPV * inside_BPV).sum(1) / claims_BV.clamp(min=1)
        chosen_BV = torch.where(claims_BV > 0, own_BV, merged_BPV.logsumexp(1))
        any_B1 = annotated_BP1.any(1).to(log_total_BV.dtype)
        loss = mean_over_annotated((log_total_BV - chosen_BV).mean(-1, keepdim=True), any_B1)
        if self.exclusion:
            unknown_BPV = data.logits_BPV.masked_fill(annotated_BP1, -torch.inf)
            # A case whose structures are all annotated has no unknown one, and no penalty.
            known_B1 = annotated_BP1.all(1)
            unknown_BPV = torch.where(known_B1[..., None], data.logits_BPV.detach() - 1e4, unknown_BPV)
            share_BV = (unknown_BPV.logsumexp(1) - log_total_BV).exp() * (claims_BV > 0)
            loss = loss + self.exclusion * mean_over_annotated(share_BV.mean(-1, keepdim=True), any_B1)
        return loss
