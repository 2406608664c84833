"""The fusion head on the CPU as one loop that `torch.compile` makes, for inference.

The torch code of `head.py` writes a tile after every step and reads it again. The compiled loop keeps the numbers of a
voxel in registers until its logit is known. Sums are rounded in another order than there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..weights import HeadWeights
from .head import backward
from .scratch import Scratch

__all__ = ["backward", "forward", "supports"]

BACKEND = "inductor"
# The loop has two products per pair of channels, so that its compilation takes minutes for many channels.
_MOST_CHANNELS = 8
# Voxels of a call. What the loop keeps of 32 prompts then fits a core's cache.
_VOXELS = 4096
# Rows of features are a few voxels apart from a power of two, which would give all rows the same places in the cache.
_APART = 16


def supports(features: Tensor, head: HeadWeights) -> bool:
    """Whether `forward` computes this head: float32 on the CPU, few channels, and all scales kept.

    Args:
        features: (B, S, C, V).
        head: The weights of the prompts.
    """
    _, scales, channels, _ = features.shape
    is_float32 = features.device.type == "cpu" and features.dtype == torch.float32
    return is_float32 and channels <= _MOST_CHANNELS and (head.top_k == 0 or head.top_k >= scales)


def forward(features: Tensor, head: HeadWeights) -> Tensor:
    """See `mome_kernels.fusion_head`. The first call for a shape compiles, which takes about half a minute.

    Raises:
        TorchDynamoException, InductorError: The machine cannot compile, as without a C++ compiler.
    """
    batch, scales, channels, voxels = features.shape
    out = features.new_empty(batch, head.prompts, voxels)
    loop = _loop(scales, channels, head.negative_slope, BACKEND)
    scratch = Scratch(features)
    part = scratch("f", scales, channels, _VOXELS + _APART)[..., :_VOXELS]
    part.zero_()  # a short last tile leaves the rest of its numbers as they are, and they must be finite
    for b in range(batch):
        # One compilation serves all numbers of prompts from two on. Copies, since those of torch's inference mode and
        # other tensors would each be compiled.
        copies = 2 if head.prompts == 1 else 1
        weights = [torch.cat([each] * copies) for each in (*head.tensors[:2], *(t[b] for t in head.tensors[2:]))]
        for tensor in weights:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for start in range(0, voxels, _VOXELS):
            n = min(_VOXELS, voxels - start)
            part[..., :n].copy_(features[b, :, :, start : start + n])
            out[b, :, start : start + n] = loop(part, *weights)[: head.prompts, :n]
    return out


@cache
def _loop(scales: int, channels: int, negative_slope: float, backend: str) -> Callable[..., Tensor]:
    """Returns the compiled function from features (S, C, n) and the weights of P prompts to logits (P, n)."""

    def logits(f: Tensor, query: Tensor, bias: Tensor, *layers: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = layers
        # A list holds one row (P, n) or (1, n) per scale or channel. Loops over lists are unrolled by the compiler.
        maps = [[f[s, c] for c in range(channels)] for s in range(scales)]
        scores = [_product(query, maps[s], bias[:, s]) for s in range(scales)]
        highest = scores[0]
        for score in scores[1:]:
            highest = torch.maximum(highest, score)
        weights = [torch.exp(score - highest) for score in scores]
        total = weights[0]
        for weight in weights[1:]:
            total = total + weight
        share = 1 / total
        hidden = []
        for c in range(channels):
            mixture = weights[0] * maps[0][c]
            for s in range(1, scales):
                mixture = mixture + weights[s] * maps[s][c]
            hidden.append(mixture * share)
        for weight_PCC, bias_PC in ((w1, b1), (w2, b2)):
            rows = [_product(weight_PCC[:, c], hidden, bias_PC[:, c]) for c in range(channels)]
            hidden = [torch.where(row > 0, row, row * negative_slope) for row in rows]
        return _product(w3, hidden, b3)

    # Without these the compiler makes several loops, or leaves products and sums apart.
    options: dict[str, str | int | bool | Callable[..., object]] = {
        "max_fusion_size": 100_000,
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    return torch.compile(logits, backend=backend, options=options if backend == "inductor" else None)


def _product(weight_PC: Tensor, rows: list[Tensor], bias_P: Tensor) -> Tensor:
    """Σ_c weight · rows[c] + bias, (P, n)."""
    result = bias_P[:, None]
    for c, row in enumerate(rows):
        result = result + weight_PC[:, c, None] * row
    return result
