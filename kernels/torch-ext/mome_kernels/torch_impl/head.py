"""The fusion head in torch: tiles of voxels that stay in cache, computed again in the backward pass.

Neither (prompts × scales × voxels) nor (prompts × channels × voxels) is ever stored whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import HeadWeights
from .scratch import Scratch

# Size of one (P, C, n) tile. Of 1 to 4 MiB this is the fastest on two cores with 2 MiB of second-level cache each.
_TILE_BYTES = 2 << 20


def tile_voxels(prompts: int, channels: int, element_size: int) -> int:
    """Voxels of a tile. It depends on shapes alone, so that a rerun adds in the same order."""
    return max(256, _TILE_BYTES // max(1, prompts * channels * element_size) // 256 * 256)


def _weights(f_SCn: Tensor, query_PC: Tensor, bias_SP: Tensor, top_k: int, scratch: Scratch) -> Tensor:
    """The softmax over the scales (S, P, n)."""
    scales, (prompts, _), voxels = f_SCn.shape[0], query_PC.shape, f_SCn.shape[2]
    score_SPn = torch.bmm(query_PC.expand(scales, -1, -1), f_SCn, out=scratch("score", scales, prompts, voxels))
    score_SPn.add_(bias_SP[..., None])
    if 0 < top_k < scales:
        best = score_SPn.sort(dim=0, descending=True, stable=True).indices[:top_k]  # the earlier of equal scores
        keep = torch.zeros_like(score_SPn, dtype=torch.bool).scatter_(0, best, True)
        score_SPn.masked_fill_(~keep, -torch.inf)
    return torch.softmax(score_SPn, 0, out=scratch("weight", scales, prompts, voxels))


def _mixture(f_SCn: Tensor, weight_SPn: Tensor | None, prompts: int, scratch: Scratch) -> Tensor:
    """The mixture Σ_s weight · f, (P, C, n)."""
    if weight_SPn is None:
        return f_SCn.expand(prompts, -1, -1)
    scales, channels, voxels = f_SCn.shape
    mixture = torch.mul(weight_SPn[0, :, None], f_SCn[0], out=scratch("mixture", prompts, channels, voxels))
    for s in range(1, scales):
        mixture.addcmul_(weight_SPn[s, :, None], f_SCn[s])
    return mixture


def _layer(x_PCn: Tensor, w_PCC: Tensor, b_PC: Tensor, negative_slope: float, out_PCn: Tensor) -> Tensor:
    """φ(W x + b)."""
    torch.baddbmm(b_PC[..., None], w_PCC, x_PCn, out=out_PCn)
    return torch.nn.functional.leaky_relu_(out_PCn, negative_slope) if negative_slope else out_PCn.relu_()


def _before_activation(grad: Tensor, result: Tensor, negative_slope: float) -> Tensor:
    """Replaces the gradient by that before the activation, whose result has the sign of its input (slope in [0, 1))."""
    if negative_slope:
        return torch.ops.aten.leaky_relu_backward.grad_input(grad, result, negative_slope, True, grad_input=grad)
    return torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)


def forward(features: Tensor, head: HeadWeights) -> Tensor:
    """See `mome_kernels.fusion_head`."""
    query, bias, w1, b1, w2, b2, w3, b3, top_k, negative_slope = head
    batch, scales, channels, voxels = features.shape
    prompts = query.shape[0]
    out = features.new_empty(batch, prompts, voxels)
    step = tile_voxels(prompts, channels, features.element_size())
    bias_SP, scratch = bias.t().contiguous(), Scratch(features)
    for b in range(batch):
        for start in range(0, voxels, step):
            n = min(step, voxels - start)
            shape = (prompts, channels, n)
            f = scratch("f", scales, channels, n).copy_(features[b, :, :, start : start + n])
            weight = _weights(f, query, bias_SP, top_k, scratch) if scales > 1 else None
            mixture = _mixture(f, weight, prompts, scratch)
            hidden = _layer(mixture, w1[b], b1[b], negative_slope, scratch("first", *shape))
            # The mixture is not read again; a fourth tile in its place would take the cache.
            hidden = _layer(hidden, w2[b], b2[b], negative_slope, scratch("mixture", *shape))
            tile = scratch("tile", prompts, 1, n)
            torch.baddbmm(b3[b, :, None, None], w3[b, :, None], hidden, out=tile)
            out[b, :, start : start + n] = tile[:, 0]
    return out


def backward(grad: Tensor, features: Tensor, head: HeadWeights) -> tuple[Tensor, ...]:
    """Gradients of the features and of the eight tensors of the head, in their order."""
    query, bias, w1, b1, w2, b2, w3, b3, top_k, negative_slope = head
    batch, scales, channels, voxels = features.shape
    prompts = query.shape[0]
    step = tile_voxels(prompts, channels, features.element_size())
    bias_SP, scratch = bias.t().contiguous(), Scratch(features)
    d_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    d_query, d_bias_SP = torch.zeros_like(query), torch.zeros_like(bias_SP)
    d_w1, d_b1, d_w2, d_b2, d_w3, d_b3 = (torch.zeros_like(t) for t in (w1, b1, w2, b2, w3, b3))
    for b in range(batch):
        w1_t, w2_t = w1[b].transpose(1, 2), w2[b].transpose(1, 2)
        for start in range(0, voxels, step):
            n = min(step, voxels - start)
            shape, part = (prompts, channels, n), slice(start, start + n)
            f = scratch("f", scales, channels, n).copy_(features[b, :, :, part])
            weight = _weights(f, query, bias_SP, top_k, scratch) if scales > 1 else None
            mixture = _mixture(f, weight, prompts, scratch)
            first = _layer(mixture, w1[b], b1[b], negative_slope, scratch("first", *shape))
            second = _layer(first, w2[b], b2[b], negative_slope, scratch("second", *shape))
            g_P1n = scratch("g", prompts, 1, n).copy_(grad[b, :, None, part])
            d_b3[b] += g_P1n.sum((1, 2))
            d_w3[b] += torch.bmm(second, g_P1n.transpose(1, 2))[..., 0]
            d_second = torch.mul(w3[b, :, :, None], g_P1n, out=scratch("d_second", *shape))
            d_second = _before_activation(d_second, second, negative_slope)
            d_b2[b] += d_second.sum(-1)
            d_w2[b] += torch.bmm(d_second, first.transpose(1, 2))
            d_first = torch.bmm(w2_t, d_second, out=scratch("second", *shape))
            d_first = _before_activation(d_first, first, negative_slope)
            d_b1[b] += d_first.sum(-1)
            d_w1[b] += torch.bmm(d_first, mixture.transpose(1, 2))
            d_mixture = torch.bmm(w1_t, d_first, out=scratch("d_second", *shape))
            if weight is None:
                torch.sum(d_mixture, 0, out=scratch("d_f", channels, n))
                d_features[b, 0, :, part] = scratch("d_f", channels, n)
                continue
            # ∂weight = Σ_c ∂mixture · f, then the derivative of the softmax
            d_score = scratch("score", scales, prompts, n).zero_()
            for c in range(channels):
                d_score.addcmul_(d_mixture[:, c], f[:, c, None])
            weighted = torch.mul(weight, d_score, out=scratch("weighted", scales, prompts, n))
            d_score.sub_(weighted.sum(0)).mul_(weight)
            d_bias_SP += d_score.sum(-1)
            d_query += torch.bmm(d_score, f.transpose(1, 2)).sum(0)
            d_f = torch.bmm(query.t().expand(scales, -1, -1), d_score, out=scratch("d_f", scales, channels, n))
            for p in range(prompts):
                d_f.addcmul_(weight[:, p, None], d_mixture[p])
            d_features[b, :, :, part] = d_f
    return d_features, d_query, d_bias_SP.t().contiguous(), d_w1, d_b1, d_w2, d_b2, d_w3, d_b3
