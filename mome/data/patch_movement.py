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
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    coordinates = []
    for axis, row in enumerate(matrix.tolist()):
        place_DHW = row[0] * d + row[1] * h + row[2] * w
        if field_3DHW is not None:
            place_DHW = place_DHW + field_3DHW[axis]
        # `grid_sample` counts from -1 to 1 between the centres of the first and the last voxel.
        coordinates.append(place_DHW * (2 / (spacing[axis] * max(volume_DHW.shape[axis] - 1, 1))))
    grid = torch.stack(coordinates[::-1], dim=-1)[None]  # the last axis comes first
    volume = F.grid_sample(volume_DHW[None, None], grid, "bilinear", "zeros", align_corners=True)[0, 0]
    codes = F.grid_sample(codes_DHW[None, None].float(), grid, "nearest", "zeros", align_corners=True)[0, 0]
    return volume, codes.to(codes_DHW.dtype)
