"""Tiles of the sliding window: where they begin, and the weight of each of their voxels."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor


def tile_steps(size: Sequence[int], patch: Sequence[int], overlap: float) -> tuple[int, int, int]:
    """Returns the voxels from the beginning of a tile to that of the next one along each axis (D, H, W).

    There are as few tiles as overlap enough. All steps are equal but the last, which may be shorter by fewer voxels
    than there are tiles; nnU-Net rounds each start. With the longest steps and what remains as the last, as many tiles
    gave worse masks (`benchmarks/results/tile_overlap.md`).

    Args:
        size: Voxels (D, H, W) of the volume.
        patch: Voxels (D, H, W) of a tile.
        overlap: The share of a tile that its neighbour covers too at least, 0 to 0.9.
    """
    d, h, w = (_step(side, p, overlap) for side, p in zip(size, patch, strict=True))
    return d, h, w


def _step(size: int, patch: int, overlap: float) -> int:
    longest, way = max(1, int(patch * (1 - overlap))), size - patch
    return longest if way <= 0 else ceil(way / ceil(way / longest))


def tile_starts(size: int, patch: int, step: int) -> list[int]:
    """Returns the first voxels of the tiles along one axis; the last tile ends where the axis ends.

    A part of the axis that begins with a tile and ends with one has the same tiles, with the same step.

    Args:
        size: Voxels along the axis.
        patch: Voxels of a tile along the axis.
        step: Voxels from one tile to the next.
    """
    return [0] if size <= patch else [*range(0, size - patch, step), size - patch]


def gaussian_window(patch: Sequence[int]) -> Tensor:
    """Returns the weights (D, H, W) of a tile's voxels.

    They are a Gaussian of σ = patch / 8 around the centre, as in nnU-Net, and at least 0.001 of its peak (our choice).
    """
    window = torch.ones(())
    for side in patch:
        at = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        window = window[..., None] * torch.exp(-0.5 * (at / (side / 8)) ** 2)
    return window.clamp_(min=1e-3)
