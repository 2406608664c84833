"""Puts the voxels of a volume into the order of another grid. Nothing is resampled."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np

from mome.volumes.grid import Grid, Volume


def reordered(volume: Volume, grid: Grid) -> Volume:
    """Returns the same voxels at the same places, with array axes that run as closely as possible as those of a grid.

    Args:
        volume: The volume, (i, j, k). Its array is not copied.
        grid: Whose axes are followed, as where a mask is stored as LAS and its scan as LPS.
    """
    # Axes are compared with each other, not by their letters: of a scan that is turned by 45 degrees, rounding decides
    # the letters, and two files of it may have others.
    cosines = _directions(grid.affine).T @ _directions(volume.affine)
    order = list(max(permutations(range(3)), key=lambda axes: np.abs(cosines[range(3), axes]).sum()))
    flipped = cosines[range(3), order] < 0
    array = volume.array.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    affine = volume.affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flipped):
        if flip:
            affine[:3, 3] += (array.shape[axis] - 1) * affine[:3, axis]
            affine[:3, axis] *= -1
    return replace(volume, array=array, affine=np.ascontiguousarray(affine))


def _directions(affine: np.ndarray) -> np.ndarray:
    """Returns the unit vectors (3, 3) of the array axes, one per column."""
    return np.asarray(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
