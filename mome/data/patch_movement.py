"""Shows a patch as a movement of its voxels shows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def centre_of(patches: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a copy of the middle of (B, D, H, W)."""
    for axis, side in enumerate(size, start=1):
        patches = patches.narrow(axis, (patches.shape[axis] - side) // 2, side)
    return patches.clone()


def moved(
    volume_DHW: Tensor,
    codes_DHW: Tensor,
    size: Sequence[int],
    spacing: Sequence[float],
    matrix: np.ndarray,
    field_3DHW: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Interpolates image and codes once, at the same places: the image linearly, the codes by the nearest voxel.

    Outside of what was read lies air (0) without labels.

    Args:
        volume_DHW: float32, the patch with its margin.
        codes_DHW: Whole numbers below 2²⁴.
        size: Voxels of the result.
        spacing: Voxel size along D, H, W in mm.
        matrix: (3, 3), from places in the result to places in the patch, in mm from their centres.
        field_3DHW: Distance in mm that is added to the places, or None.

    Returns:
        Volume and codes (D, H, W) of the result's size.
    """
    device = volume_DHW.device
    axes = [
        (torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2) * step
        for side, step in zip(size, spacing, strict=True)
    ]
    grid = torch.empty(1, *size, 3, device=device)
    for axis, row in enumerate(matrix.tolist()):
        # `grid_sample` counts from -1 to 1 between the centres of the first and the last voxel.
        unit = 2 / (spacing[axis] * max(volume_DHW.shape[axis] - 1, 1))
        d, h, w = (factor * unit * places for factor, places in zip(row, axes, strict=True))
        place_DHW = (d[:, None] + h)[..., None] + w
        if field_3DHW is not None:
            place_DHW = place_DHW + unit * field_3DHW[axis]
        grid[0, ..., 2 - axis] = place_DHW  # the last axis of the patch comes first
    volume = F.grid_sample(volume_DHW[None, None], grid, "bilinear", "zeros", align_corners=True)[0, 0]
    codes = F.grid_sample(codes_DHW[None, None].float(), grid, "nearest", "zeros", align_corners=True)[0, 0]
    return volume, codes.to(codes_DHW.dtype)
