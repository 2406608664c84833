"""Tiles of the sliding window: where they start, and the weight of each of their voxels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tile_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Returns the first voxels of the tiles along one axis, in even steps; the last tile ends where the axis ends.

    Args:
        size: Voxels along the axis.
        patch: Voxels of a tile along the axis.
        overlap: The share of a tile that its neighbour covers too, 0 to 0.9.
    """
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    starts = list(range(0, size - patch, step))
    return [*starts, size - patch]


def gaussian_window(patch: Sequence[int]) -> Tensor:
    """Returns the weights (D, H, W) of a tile's voxels.

    They are a Gaussian of σ = patch / 8 around the centre, as in nnU-Net, and at least 0.001 of its peak (our choice).
    """
    window = torch.ones(())
    for side in patch:
        at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (at / (side / 8)) ** 2)
    return window.clamp_(min=1e-3)
