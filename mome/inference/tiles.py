"""Sliding-window tiles: where they lie and how much each voxel of one counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tile_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the tiles along one axis: even steps, the last tile flush with the end."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    starts = list(range(0, size - patch, step))
    return [*starts, size - patch]


def gaussian_window(patch: Sequence[int]) -> Tensor:
    """Weights (D, H, W) of a tile: a Gaussian of σ = patch / 8 (nnU-Net's choice), at least 0.1 % of its peak."""
    window = torch.ones(())
    for side in patch:
        at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (at / (side / 8)) ** 2)
    return window.clamp_(min=1e-3)
