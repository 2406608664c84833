"""Cross entropy and overlap of every row of logits, in one pass that keeps no tensor per voxel but its arguments.

Written as ordinary operations, the loss keeps or makes nine float32 tensors of the size of the logits: of two patches
of 64³ voxels with seven prompts, 130 MB. Here the forward pass works on parts of the logits that fit the cache of a
processor, and the backward pass computes the gradient from logits and targets again. Shapes: B batch, P prompts,
V voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one part; on a GPU, which needs many voxels at once, a part is larger. Our choice.
_PART, _PART_GPU = 2**18, 2**23


class RowSums(NamedTuple):
    """Sums over the voxels of case b and prompt p, each (B, P); σ are probabilities, t targets.

    Attributes:
        cross_entropy: Σ −(w t log σ + (1 − t) log(1 − σ)), with the weight w of voxels inside.
        both: Σ σ t.
        probability: Σ σ.
        target: Σ t.
    """

    cross_entropy: Tensor
    both: Tensor
    probability: Tensor
    target: Tensor


def row_sums(logits_BPV: Tensor, targets_BPV: Tensor, positive_weight: float = 1.0) -> RowSums:
    """Returns the sums, float32, or float64 where the logits are; gradients flow to the logits, once.

    Args:
        logits_BPV: Logits of any floating type.
        targets_BPV: 0 or 1, of any type.
        positive_weight: Weight w of voxels inside a structure in the cross entropy.
    """
    return RowSums(*_RowSums.apply(logits_BPV, targets_BPV, positive_weight))


class _RowSums(torch.autograd.Function):
    """See `row_sums`."""

    @staticmethod
    def forward(ctx: Any, logits_BPV: Tensor, targets_BPV: Tensor, positive_weight: float) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits_BPV, targets_BPV)
        ctx.positive_weight = positive_weight
        dtype = torch.promote_types(logits_BPV.dtype, torch.float32)
        sums_4BP = logits_BPV.new_zeros((4, *logits_BPV.shape[:2]), dtype=dtype)
        for rows in _parts(logits_BPV):
            x_RV, t_RV = logits_BPV[rows].to(dtype), targets_BPV[rows].to(dtype)
            p_RV = x_RV.sigmoid()
            sums_4BP[0][rows] = _cross_entropy(x_RV, t_RV, positive_weight).sum(-1)
            sums_4BP[2][rows] = p_RV.sum(-1)
            sums_4BP[1][rows] = p_RV.mul_(t_RV).sum(-1)
            sums_4BP[3][rows] = t_RV.sum(-1)
        sums = sums_4BP.unbind()
        ctx.mark_non_differentiable(sums[3])
        return sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, cross_BP: Tensor, both_BP: Tensor, probability_BP: Tensor, target_BP: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits_BPV, targets_BPV = ctx.saved_tensors
        gradient_BPV = torch.empty_like(logits_BPV)
        for rows in _parts(logits_BPV):
            t_RV = targets_BPV[rows].to(cross_BP.dtype)
            p_RV = logits_BPV[rows].to(cross_BP.dtype).sigmoid()
            rest_RV = 1 - p_RV
            # d/dx of the cross entropy is (1 − t) σ − w t (1 − σ), of σ it is σ (1 − σ). The targets may be the
            # caller's own tensor, so that nothing is written to them.
            inside_RV = t_RV * rest_RV
            slope_RV = (both_BP[rows][:, None] * t_RV).add_(probability_BP[rows][:, None])
            slope_RV.mul_(p_RV).mul_(rest_RV)
            cross_RV = p_RV.addcmul_(p_RV, t_RV, value=-1).sub_(inside_RV, alpha=ctx.positive_weight)
            cross_RV.mul_(cross_BP[rows][:, None])
            gradient_BPV[rows] = slope_RV.add_(cross_RV)
        return gradient_BPV, None, None


def _cross_entropy(x_RV: Tensor, t_RV: Tensor, positive_weight: float) -> Tensor:
    """Returns w t softplus(−x) + (1 − t) softplus(x) of every voxel; softplus(x) is max(x, 0) + log(1 + e^−|x|)."""
    log_RV = _log1p(x_RV.abs().neg_().exp_())
    cross_RV = x_RV.clamp(min=0).addcmul_(x_RV, t_RV, value=-1).add_(log_RV)
    if positive_weight != 1:
        inside_RV = log_RV.sub_(x_RV.clamp(max=0))
        cross_RV.addcmul_(inside_RV, t_RV, value=positive_weight - 1)
    return cross_RV


def _log1p(x: Tensor) -> Tensor:
    """Returns log(1 + x) for x ≥ 0, up to rounding; overwrites x.

    `torch.log1p` takes eight times as long on a CPU (torch 2.14). The logarithm of the rounded u = 1 + x is
    corrected by the first order of what the rounding lost, (x − (u − 1)) / u.
    """
    u = x + 1
    lost = x.sub_(u - 1).div_(u)
    return u.log_().add_(lost)


def _parts(logits_BPV: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields the case and the prompts of every part."""
    cases, prompts, voxels = logits_BPV.shape
    size = max(1, (_PART_GPU if logits_BPV.is_cuda else _PART) // max(voxels, 1))
    for case in range(cases):
        for first in range(0, prompts, size):
            yield case, slice(first, first + size)
