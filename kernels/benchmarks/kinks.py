"""Outputs near a kink, where two correct results in floating point may differ by a jump.

The derivative of ReLU jumps at zero, and so does the choice of the largest scores where two of them are nearly equal. A
rounding error of 1e-7 meets such a place in about one of ten checks, so that checks leave these outputs out. They are
found in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from mome_kernels import reference
from torch import Tensor

MARGIN = 1e-5  # in units of a layer's standard deviation; about 30 times the rounding error of float32


def _far_from_zero(z: Tensor, margin: float) -> Tensor:
    return z.abs() > margin * z.std(correction=0)


@torch.no_grad()
def smooth_tokens(inputs: list[Any], margin: float = MARGIN) -> Tensor | None:
    """(T, 1), 1 for tokens of `moe_mlp` none of whose hidden units is near the kink; None where there is no kink."""
    x, ids, _, up, up_bias, down, _, activation, _ = inputs
    if activation != "relu":
        return None
    width = down.shape[2]
    z_TEF = torch.einsum("td,efd->tef", x.double(), up[:, :width].double())
    if up_bias is not None:
        z_TEF += up_bias[:, :width].double()
    far_TE = _far_from_zero(z_TEF, margin).all(-1)
    return far_TE.gather(1, ids.long()).all(1, keepdim=True).to(x.dtype)


@torch.no_grad()
def smooth_voxels(inputs: list[Any], margin: float = MARGIN) -> Tensor:
    """(B, P, V), 1 where no hidden unit of `fusion_head` is near the kink and no choice of scales is nearly a tie."""
    features, query, scale_bias, w1, b1, w2, b2, *_, top_k, slope = inputs
    features, query, scale_bias, w1, b1, w2, b2 = (
        tensor.double() for tensor in (features, query, scale_bias, w1, b1, w2, b2)
    )
    weight_BPSV = reference.fusion_weights(features, query, scale_bias, top_k)
    mixture = torch.einsum("bpsv,bscv->bpcv", weight_BPSV, features)
    first = w1 @ mixture + b1[..., None]
    second = w2 @ torch.nn.functional.leaky_relu(first, slope) + b2[..., None]
    smooth = _far_from_zero(first, margin).all(2) & _far_from_zero(second, margin).all(2)
    if 0 < top_k < features.shape[1]:
        score = torch.einsum("pc,bscv->bpsv", query, features) + scale_bias[None, :, :, None]
        ranked = score.sort(dim=2, descending=True).values
        smooth &= ranked[:, :, top_k - 1] - ranked[:, :, top_k] > margin * score.std(correction=0)
    return smooth.to(inputs[0].dtype)
