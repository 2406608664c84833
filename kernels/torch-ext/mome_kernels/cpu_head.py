"""The fusion head on the CPU: tiles of voxels that stay in cache, recomputed in the backward pass.

Neither (prompts × scales × voxels) nor (prompts × channels × voxels) is ever stored whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_BYTES = 1 << 20  # one (P, C, n) tile; a few of them fit a core's caches


def tile_voxels(prompts: int, channels: int, element_size: int) -> int:
    """Voxels of a tile, from shapes alone, so that a rerun adds in the same order."""
    return max(256, _TILE_BYTES // max(1, prompts * channels * element_size) // 256 * 256)


def _weights(f_SCn: Tensor, query_PC: Tensor, bias_SP: Tensor, top_k: int) -> Tensor:
    """(S, P, n): the softmax over the scales."""
    score_SPn = torch.matmul(query_PC, f_SCn).add_(bias_SP[..., None])
    if 0 < top_k < score_SPn.shape[0]:
        best = score_SPn.topk(top_k, dim=0).indices
        keep = torch.zeros_like(score_SPn, dtype=torch.bool).scatter_(0, best, True)
        score_SPn.masked_fill_(~keep, -torch.inf)
    return score_SPn.softmax(dim=0)


def _mixture(f_SCn: Tensor, weight_SPn: Tensor | None, prompts: int) -> Tensor:
    """(P, C, n) = Σ_s weight · f."""
    if weight_SPn is None:
        return f_SCn.expand(prompts, -1, -1)
    mixture = weight_SPn[0, :, None] * f_SCn[0]
    for s in range(1, f_SCn.shape[0]):
        mixture.addcmul_(weight_SPn[s, :, None], f_SCn[s])
    return mixture


def _activate(x: Tensor, negative_slope: float) -> Tensor:
    return torch.nn.functional.leaky_relu_(x, negative_slope) if negative_slope else x.relu_()


def _gradient(grad: Tensor, result: Tensor, negative_slope: float) -> Tensor:
    """The gradient before the activation, from its result: a slope in [0, 1] keeps the sign."""
    if negative_slope:
        return torch.ops.aten.leaky_relu_backward(grad, result, negative_slope, True)
    return grad.mul_(result > 0)


def forward(
    features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor,
    b3: Tensor, top_k: int, negative_slope: float,
) -> Tensor:  # fmt: skip
    """See `mome_kernels.fusion_head`."""
    batch, scales, channels, voxels = features.shape
    prompts = query.shape[0]
    out = features.new_empty(batch, prompts, voxels)
    step = tile_voxels(prompts, channels, features.element_size())
    bias_SP = bias.t().contiguous()
    for b in range(batch):
        for start in range(0, voxels, step):
            f = features[b, :, :, start : start + step].contiguous()
            weight = _weights(f, query, bias_SP, top_k) if scales > 1 else None
            mixture = _mixture(f, weight, prompts)
            hidden = _activate(torch.baddbmm(b1[b, :, :, None], w1[b], mixture), negative_slope)
            hidden = _activate(torch.baddbmm(b2[b, :, :, None], w2[b], hidden), negative_slope)
            tile = torch.baddbmm(b3[b, :, None, None], w3[b, :, None], hidden)
            out[b, :, start : start + step] = tile[:, 0]
    return out


def backward(
    grad: Tensor, features: Tensor, query: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    w3: Tensor, b3: Tensor, top_k: int, negative_slope: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all nine inputs, in their order."""
    batch, scales, channels, voxels = features.shape
    prompts = query.shape[0]
    step = tile_voxels(prompts, channels, features.element_size())
    bias_SP = bias.t().contiguous()
    d_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    d_query, d_bias_SP = torch.zeros_like(query), torch.zeros_like(bias_SP)
    d_w1, d_b1, d_w2, d_b2, d_w3, d_b3 = (torch.zeros_like(t) for t in (w1, b1, w2, b2, w3, b3))
    for b in range(batch):
        w1_t, w2_t = w1[b].transpose(1, 2), w2[b].transpose(1, 2)
        for start in range(0, voxels, step):
            f = features[b, :, :, start : start + step].contiguous()
            weight = _weights(f, query, bias_SP, top_k) if scales > 1 else None
            mixture = _mixture(f, weight, prompts)
            first = _activate(torch.baddbmm(b1[b, :, :, None], w1[b], mixture), negative_slope)
            second = _activate(torch.baddbmm(b2[b, :, :, None], w2[b], first), negative_slope)
            g_P1n = grad[b, :, None, start : start + step].contiguous()
            d_b3[b] += g_P1n.sum((1, 2))
            d_w3[b] += torch.bmm(second, g_P1n.transpose(1, 2))[..., 0]
            d_second = _gradient(w3[b, :, :, None] * g_P1n, second, negative_slope)
            d_b2[b] += d_second.sum(-1)
            d_w2[b] += torch.bmm(d_second, first.transpose(1, 2))
            d_first = _gradient(torch.bmm(w2_t, d_second), first, negative_slope)
            d_b1[b] += d_first.sum(-1)
            d_w1[b] += torch.bmm(d_first, mixture.transpose(1, 2))
            d_mixture = torch.bmm(w1_t, d_first)  # (P, C, n)
            if weight is None:
                d_features[b, 0, :, start : start + step] = d_mixture.sum(0)
                continue
            d_weight = torch.stack([(d_mixture * f[s]).sum(1) for s in range(scales)])  # (S, P, n)
            d_score = weight * (d_weight - (weight * d_weight).sum(0, keepdim=True))
            d_bias_SP += d_score.sum(-1)
            d_query += torch.bmm(d_score, f.transpose(1, 2)).sum(0)
            d_f = torch.matmul(query.t(), d_score)  # (S, C, n)
            for s in range(scales):
                d_f[s] += (weight[s, :, None] * d_mixture).sum(0)
            d_features[b, :, :, start : start + step] = d_f
    return d_features, d_query, d_bias_SP.t().contiguous(), d_w1, d_b1, d_w2, d_b2, d_w3, d_b3
