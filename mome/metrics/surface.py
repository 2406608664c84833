"""Surface metrics in mm: normalised surface Dice at a tolerance, and the 95th percentile Hausdorff distance.

Surfaces are defined as in Google DeepMind's `surface-distance` (Nikolov et al. 2021). Every cube of 2×2×2 voxels that
contains both inside and outside voxels is a surface element. Its area is that of the marching-cubes triangles of its
corner pattern; the areas of all 256 patterns equal those of that package. Distances are measured between the centres of
surface elements.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from mome.metrics.overlap import as_binary_pair
from mome.volumes.boxes import bounding_box
from mome.volumes.grid import SPACING_ROUNDING


def normalized_surface_dice(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> float:
    """The share of both surfaces that lies within `tolerance` mm of the other surface (Nikolov et al. 2021).

    Args:
        prediction, reference: Binary masks (i, j, k) of the same shape.
        spacing: Voxel size in mm.
        tolerance: Distance in mm.

    Returns:
        From 0 to 1; NaN if both masks are empty, 0 if one is.

    Raises:
        ValueError: The shapes differ.
    """
    empty = _which_are_empty(prediction, reference)
    if empty is not None:
        return float("nan") if empty == "both" else 0.0
    to_reference, area_p, to_prediction, area_r = _distances(prediction, reference, spacing)
    tolerance *= 1 + SPACING_ROUNDING  # else rounding decides about surfaces that lie exactly so far away
    close = area_p[to_reference <= tolerance].sum() + area_r[to_prediction <= tolerance].sum()
    return float(close / (area_p.sum() + area_r.sum()))


def hausdorff95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """The 95th percentile Hausdorff distance: the larger of the two directed percentiles, weighted by area.

    Args:
        prediction, reference: Binary masks (i, j, k) of the same shape.
        spacing: Voxel size in mm.

    Returns:
        Distance in mm; NaN if both masks are empty, the diagonal of the image if one is.

    Raises:
        ValueError: The shapes differ.
    """
    empty = _which_are_empty(prediction, reference)
    if empty is not None:
        diagonal = float(np.linalg.norm(np.asarray(prediction.shape) * np.asarray(spacing)))
        return float("nan") if empty == "both" else diagonal
    to_reference, area_p, to_prediction, area_r = _distances(prediction, reference, spacing)
    return max(_percentile(to_reference, area_p), _percentile(to_prediction, area_r))


def _which_are_empty(prediction: np.ndarray, reference: np.ndarray) -> str | None:
    """Returns "both", "one" or None."""
    prediction, reference = as_binary_pair(prediction, reference)
    empty = 2 - int(prediction.any()) - int(reference.any())
    return (None, "one", "both")[empty]


def _percentile(distance: np.ndarray, area: np.ndarray, share: float = 0.95) -> float:
    """The distance within which `share` of the area lies."""
    order = np.argsort(distance)
    cumulative = np.cumsum(area[order]) / area.sum()
    return float(distance[order][min(int(np.searchsorted(cumulative, share)), len(order) - 1)])


def _distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distances of surface elements to the other surface, with their areas.

    Returns:
        For the elements of the prediction, distances (mm) to the reference and areas (mm²); then the same for the
        elements of the reference.
    """
    prediction, reference = as_binary_pair(prediction, reference)
    box = bounding_box(prediction | reference)
    codes = [_corner_codes(np.pad(mask[box], 1)) for mask in (prediction, reference)]
    areas = _areas(tuple(float(s) for s in spacing))
    surfaces = [(code != 0) & (code != 255) for code in codes]
    to_reference = ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]
    to_prediction = ndimage.distance_transform_edt(~surfaces[0], sampling=spacing)[surfaces[1]]
    return to_reference, areas[codes[0][surfaces[0]]], to_prediction, areas[codes[1][surfaces[1]]]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """The corner pattern of every 2×2×2 cube as uint8, one bit for each of its voxels."""
    code = np.zeros(tuple(n - 1 for n in mask.shape), dtype=np.uint8)
    for bit, (a, b, c) in enumerate(np.ndindex(2, 2, 2)):
        part = mask[a : a + code.shape[0], b : b + code.shape[1], c : c + code.shape[2]]
        code |= part.astype(np.uint8) << np.uint8(bit)
    return code


@lru_cache(maxsize=16)
def _areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Area in mm² of the surface inside a cube, for each of the 256 corner patterns."""
    x, y, z = spacing
    faces = np.array([y * z, x * z, x * y])  # an area vector scales with the two axes that it is normal to
    return np.array([np.linalg.norm(vectors * faces, axis=1).sum() for vectors in _area_vectors()])


@lru_cache(maxsize=1)
def _area_vectors() -> list[np.ndarray]:
    """Area vectors (triangles, 3) of the surface inside a unit cube, for each of the 256 corner patterns.

    The surface consists of the marching-cubes triangles through the midpoints of the cut edges. Where a pattern is
    ambiguous, because its corners touch only along diagonals, `surface-distance` gives each connected component of the
    inside corners a surface of its own; of more than four inside corners, each component of the outside corners.
    """
    from skimage.measure import marching_cubes

    found = []
    for code in range(256):
        inside = ((code >> np.arange(8)) & 1).reshape(2, 2, 2)
        components, count = ndimage.label(inside if inside.sum() <= 4 else 1 - inside)
        vectors = [np.zeros((0, 3))]
        for component in range(1, count + 1):
            vertices, faces, _, _ = marching_cubes((components == component).astype(np.float32), 0.5)
            a, b, c = vertices.astype(np.float64)[faces].transpose(1, 0, 2)
            vectors.append(np.cross(b - a, c - a) / 2)
        found.append(np.concatenate(vectors))
    return found
