"""What a mask measures on its scan: volume, HU, place, the borders it touches, and its pieces."""

from __future__ import annotations

from typing import Any

import numpy as np

from mome.volumes.boxed import BoxedArray
from mome.volumes.boxes import Box, bounding_box
from mome.volumes.grid import Grid

_FACES = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior", "S": "superior"}
_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "I": "S", "S": "I"}
_DIGITS = 3


def structure_statistics(mask: BoxedArray, hu: np.ndarray, grid: Grid) -> dict[str, Any]:
    """Measures one structure. Only voxels in the box around it are looked at.

    Args:
        mask: (i, j, k) of 0 and 1; the values of its box may be larger than what the mask holds.
        hu: (i, j, k) of HU, on the same grid.
        grid: The grid of both.

    Returns:
        `voxels`; `volume_ml`; `mean_hu`, `median_hu`, `sd_hu` (of all voxels, not of a sample), `p5_hu` and `p95_hu`
        (percentiles, linear between values); `box_voxels`, per axis the first and the last index; `box_mm`, per world
        axis (RAS) the smallest and the largest coordinate of the box's outer faces; `touches`, the faces of the scan
        that the mask reaches, where it is probably cut off; `pieces`, connected by faces, edges or corners; and
        `largest_piece_voxels`. What an empty mask has not is None.
    """
    tight = bounding_box(mask.values)
    inside = mask.values[tight].astype(bool)
    i, j, k = (slice(at + side.start, at + side.stop) for at, side in zip(mask.first, tight, strict=True))
    box = (i, j, k)
    voxels = int(np.count_nonzero(inside))
    volume = voxels * abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
    found: dict[str, Any] = {"voxels": voxels, "volume_ml": round(volume, _DIGITS)}
    found |= _intensities(hu[box][inside])
    pieces = _pieces(inside)
    return {
        **found,
        "box_voxels": [[side.start, side.stop - 1] for side in box] if voxels else None,
        "box_mm": _box_in_mm(box, grid.affine) if voxels else None,
        "touches": _faces_touched(box, grid) if voxels else [],
        "pieces": len(pieces),
        "largest_piece_voxels": max(pieces, default=0),
    }


def _intensities(values: np.ndarray) -> dict[str, float | None]:
    """Returns mean, median, standard deviation and percentiles of HU; None where there is no value."""
    names = ("mean_hu", "median_hu", "sd_hu", "p5_hu", "p95_hu")
    if not values.size:
        return dict.fromkeys(names)
    low, median, high = np.percentile(values, [5, 50, 95])
    numbers = (values.mean(dtype=np.float64), median, values.std(dtype=np.float64), low, high)
    return {name: round(float(number), _DIGITS) for name, number in zip(names, numbers, strict=True)}


def _pieces(inside: np.ndarray) -> list[int]:
    """Returns the voxels of every connected piece."""
    from scipy import ndimage

    if not inside.any():
        return []
    labelled, _ = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    return np.bincount(labelled.ravel())[1:].tolist()


def _box_in_mm(box: Box, affine: np.ndarray) -> list[list[float]]:
    ends = [(side.start - 0.5, side.stop - 0.5) for side in box]
    corners = np.array([[i, j, k, 1] for i in ends[0] for j in ends[1] for k in ends[2]]) @ affine.T
    return [[round(float(low), _DIGITS), round(float(high), _DIGITS)] for low, high in
            zip(corners[:, :3].min(axis=0), corners[:, :3].max(axis=0), strict=True)]  # fmt: skip


def _faces_touched(box: Box, grid: Grid) -> list[str]:
    """Returns the faces of the scan that a box reaches, named by the direction closest to the array axis."""
    faces = []
    for side, letter, size in zip(box, grid.orientation, grid.shape, strict=True):
        if side.start == 0:
            faces.append(_FACES[_OPPOSITE[letter]])
        if side.stop == size:
            faces.append(_FACES[letter])
    return sorted(faces)
