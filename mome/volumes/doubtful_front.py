"""Notes on scans whose front seems to be their back: an array saved under an affine whose signs are missing.

An array of pydicom or SimpleITK runs to left and posterior. Saved with the voxel sizes alone as its affine, it claims
to run to right and anterior, and left and right are exchanged, too. In the trunk and the neck, air inside of the body
(throat, windpipe, lungs, bowel) lies in front of the bone near the midline, which is the spine for the most part. This
holds for prone patients, too, where the affine says that they are prone.

All thresholds are our choice. benchmarks/results/doubtful_values.md has how often real scans reach them.
"""

from __future__ import annotations

import numpy as np

from mome.volumes.orientation import closest_axes

_FEWEST_VOXELS, _FEWEST_SIDE = 30_000, 16
# Voxels are looked at on a grid of about this many per axis.
_PER_AXIS = 64
_TISSUE, _AIR, _BONE = -300.0, -400.0, 250.0
# The share of the body's width, to each side of its middle, in which the spine lies.
_HALF_WIDTH = 0.2
# A plane counts with this much of each, and a scan with this many planes.
_FEWEST_TISSUE, _FEWEST_OF_EACH, _FEWEST_DEPTH, _FEWEST_PLANES = 20, 3, 4.0, 16
# How far air lies behind the bone, as a share of the body's depth. Of right scans, none goes beyond 0.09.
_BEHIND = 0.12


def doubtful_front(array: np.ndarray, affine: np.ndarray) -> list[str]:
    """Returns a note where air inside of the body lies behind its bones.

    Args:
        array: (i, j, k), HU, finite.
        affine: (4, 4), from voxels to mm in RAS.
    """
    if array.size < _FEWEST_VOXELS or min(array.shape) < _FEWEST_SIDE:
        return []
    before = _air_before_bone(_coarse_ras(array, affine))
    if before is None or before > -_BEHIND:
        return []
    return [
        "the spine seems to lie in front of throat, lungs or bowel: are the signs of the affine missing, so that front "
        "and back, and perhaps left and right, are exchanged?"
    ]


def _coarse_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Every few voxels, with axes that run to right, anterior and superior as closely as the array's axes do."""
    axes = closest_axes(affine)
    steps = [max(1, side // _PER_AXIS) for side in array.shape]
    coarse = array[:: steps[0], :: steps[1], :: steps[2]]
    coarse = coarse[tuple(slice(None, None, sign) for _, sign in axes)]
    return coarse.transpose([[world for world, _ in axes].index(world) for world in range(3)])


def _air_before_bone(coarse: np.ndarray) -> float | None:
    """Returns how far enclosed air lies in front of bone: the median over the planes, as a share of the body's depth.

    None where too few planes have both.
    """
    from scipy import ndimage

    tissue = coarse > _TISSUE
    places = np.nonzero(tissue.any(axis=(1, 2)))[0]
    if not places.size:
        return None
    middle = float(np.nonzero(tissue)[0].mean())
    half = _HALF_WIDTH * (places[-1] - places[0] + 1)
    strip = slice(max(0, int(middle - half)), int(middle + half) + 1)
    found = []
    for plane in range(coarse.shape[2]):
        values, inside = coarse[:, :, plane], tissue[:, :, plane]
        body = np.nonzero(inside[strip])[1]
        bone = np.nonzero(values[strip] > _BONE)[1]
        if body.size < _FEWEST_TISSUE or bone.size < _FEWEST_OF_EACH:
            continue
        low, high = np.percentile(body, [2, 98])
        enclosed = ndimage.binary_fill_holes(inside) & (values < _AIR)
        air = np.nonzero(enclosed[strip])[1]
        if air.size >= _FEWEST_OF_EACH and high - low >= _FEWEST_DEPTH:
            found.append((air.mean() - bone.mean()) / (high - low))
    return float(np.median(found)) if len(found) >= _FEWEST_PLANES else None
