"""Brings the maps of all scales to the finest size and stacks them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from mome.layers.trilinear import resize


def stack_scales(maps: list[Tensor], size: Sequence[int]) -> Tensor:
    """S maps (B, C, D_s, H_s, W_s) → one tensor (B, S, C, D, H, W) of their widest type; trilinear resizing.

    Args:
        maps: The maps. Without gradients the list is emptied: each map is dropped once it lies in the stack, and only
            one resized map is held at a time.
        size: The finest size (D, H, W).
    """
    if torch.is_grad_enabled():
        return torch.stack([resize(map_BCDHW, size) for map_BCDHW in maps], dim=1)
    # As `torch.stack` does; under autocast, maps of two scales may have two types.
    dtype = reduce(torch.promote_types, [map_BCDHW.dtype for map_BCDHW in maps])
    stack = maps[0].new_empty(maps[0].shape[0], len(maps), maps[0].shape[1], *size, dtype=dtype)
    for scale in range(len(maps)):
        stack[:, scale].copy_(resize(maps.pop(0), size))
    return stack
