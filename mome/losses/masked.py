"""What every loss shares: annotated structures only, and sums over all processes.

A loss gets logits and targets (B, P, D, H, W), and `supervised_BP`, True where prompt p is annotated in case b. What is
not annotated adds neither value nor gradient, unless the loss says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(x: Tensor) -> Tensor:
    """Sums over all processes, differentiably, so that the loss does not depend on how the batch is shared out.

    Data-parallel training averages the gradients of W processes, and each process computes the same loss from the sum.
    The gradient of the sum is therefore W times that of this process's own values, which needs no second exchange.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())


@dataclass(frozen=True)
class Masked:
    """Logits and targets, flattened over the voxels, and the mask of what is annotated.

    All are float32, or float64 where the logits are.

    Attributes:
        logits_BPV: Logits.
        targets_BPV: 0 or 1.
        mask_BP: 1 where prompt p is annotated in case b, else 0.
    """

    logits_BPV: Tensor
    targets_BPV: Tensor
    mask_BP: Tensor


def masked(logits: Tensor, targets: Tensor, supervised_BP: Tensor | None) -> Masked:
    """Prepares what losses compute with.

    Args:
        logits, targets: (B, P, D, H, W).
        supervised_BP: Bool; None means that all are annotated.
    """
    logits_BPV = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(2)
    targets_BPV = targets.flatten(2).to(logits_BPV.dtype)
    if supervised_BP is None:
        supervised_BP = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return Masked(logits_BPV, targets_BPV, supervised_BP.to(logits_BPV.dtype))


def mean_over_annotated(values_BP: Tensor, mask_BP: Tensor) -> Tensor:
    """Returns the mean of the annotated values over all processes; 0 where nothing is annotated."""
    sums = sum_over_processes(torch.stack([(values_BP * mask_BP).sum(), mask_BP.sum()]))
    return sums[0] / sums[1].detach().clamp(min=1)


def overlap_sums(data: Masked) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns, for every prompt, sums over the annotated voxels of all cases and processes.

    Returns:
        Σ p·t, Σ p, Σ t, each (P,), and 1 for prompts that a case annotates, else 0. p are probabilities.
    """
    probability = data.logits_BPV.sigmoid()
    both_P, p_P, t_P = (
        (values.sum(-1) * data.mask_BP).sum(0)
        for values in (probability * data.targets_BPV, probability, data.targets_BPV)
    )
    sums = sum_over_processes(torch.stack([both_P, p_P, t_P, data.mask_BP.sum(0)]))
    return sums[0], sums[1], sums[2], (sums[3].detach() > 0).to(sums.dtype)


def mean_over_present(values_P: Tensor, present_P: Tensor) -> Tensor:
    """Returns the mean over the prompts that a case annotates; 0 where there is none."""
    return (values_P * present_P).sum() / present_P.sum().clamp(min=1)
