"""A note on masks of which one lies above another in a way that no patient has.

Only head and feet are looked at. Left and right cannot be told in this way: in a mirrored scan the bundled models draw
the liver on the side that the header calls right. benchmarks/results/doubtful_values.md has the figures.
"""

from __future__ import annotations

import numpy as np

from mome.inference.packed import PackedMasks
from mome.volumes import Grid

_LIVER = "liver"
_LUNGS = (
    *("lung_left", "lung_right", "lung_upper_lobe_left", "lung_lower_lobe_left"),
    *("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
)
# The liver and the lungs together are looked at with this much of each, and doubted where the liver's centre is this
# much higher (our choice). Of right scans with so much of both, it lies 50 mm lower at least, but for one false mask.
_LEAST_ML, _HIGHER_MM = 200.0, 20.0
# Voxels of a mask that are looked at, at most.
_SAMPLE = 4_000_000


def upside_down(masks: PackedMasks, grid: Grid) -> list[str]:
    """Returns a note where the mask of the liver lies above those of the lungs.

    Args:
        masks: The masks.
        grid: Their grid.
    """
    lungs = [name for name in _LUNGS if name in masks.names]
    voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
    least = _LEAST_ML / voxel_ml
    if _LIVER not in masks.names or masks.voxels[_LIVER] < least or sum(masks.voxels[name] for name in lungs) < least:
        return []
    liver, lung = _height(masks, [_LIVER], grid), _height(masks, lungs, grid)
    if liver is None or lung is None or liver - lung <= _HIGHER_MM:
        return []
    return [
        f"the mask of the liver lies {liver - lung:.0f} mm above those of the lungs: a mask is wrong, or the header of "
        "the scan exchanges head and feet, and perhaps left and right"
    ]


def _height(masks: PackedMasks, names: list[str], grid: Grid) -> float | None:
    """Returns how far up (mm, RAS) the centre of some masks lies; None where the sample meets none of their voxels."""
    step = max(1, round((np.prod(grid.shape) / _SAMPLE) ** (1 / 3)))
    voxels, sums = 0, np.zeros(3)
    for name in names:
        sample = masks.sampled(name, step)
        # Lists of the voxels' indices would take 24 bytes for each of millions of voxels.
        for axis in range(3):
            counts = sample.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.int64)
            sums[axis] += step * float(counts @ np.arange(len(counts)))
        voxels += int(counts.sum())
    if not voxels:
        return None
    return float(grid.affine[2, :3] @ (sums / voxels) + grid.affine[2, 3])
