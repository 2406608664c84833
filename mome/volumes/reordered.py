"""Puts the voxels of a volume into the order of another grid. Nothing is resampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mome.volumes.grid import Grid, Volume
from mome.volumes.orientation import closest_axes


def reordered(volume: Volume, grid: Grid) -> Volume:
    """Returns the same voxels at the same places, with array axes that run as closely as possible as those of a grid.

    Args:
        volume: The volume, (i, j, k). Its array is not copied.
        grid: Whose axes are followed, as where a mask is stored as LAS and its scan as LPS.
    """
    ours, wanted = closest_axes(volume.affine), closest_axes(grid.affine)
    order = [[world for world, _ in ours].index(world) for world, _ in wanted]
    flipped = [ours[axis][1] != sign for axis, (_, sign) in zip(order, wanted, strict=True)]
    array = volume.array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    affine = volume.affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flipped):
        if flip:
            affine[:3, 3] += (array.shape[axis] - 1) * affine[:3, axis]
            affine[:3, axis] *= -1
    return replace(volume, array=array, affine=np.ascontiguousarray(affine))
