"""Surface metrics in mm: normalised surface Dice at a tolerance, and the 95th percentile Hausdorff distance.

Surfaces are those of Google DeepMind's `surface-distance` (Nikolov et al. 2021): every cube of 2×2×2 voxels that
holds both inside and outside is a surface element; its area is that of the marching-cubes triangles of its
corner pattern, and distances are measured between centres of such cubes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from mome.metrics.overlap import _pair


def normalized_surface_dice(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float], tolerance: float
) -> float:
    """Share of both surfaces that lies within `tolerance` mm of the other (Nikolov et al. 2021).

    Both empty: NaN. One empty: 0.

    Args:
        prediction, reference: Binary masks (i, j, k).
        spacing: Voxel size in mm.
        tolerance: In mm.
    """
    empty = _empty(prediction, reference)
    if empty is not None:
        return float("nan") if empty == "both" else 0.0
    to_reference, area_p, to_prediction, area_r = _distances(prediction, reference, spacing)
    close = area_p[to_reference <= tolerance].sum() + area_r[to_prediction <= tolerance].sum()
    return float(close / (area_p.sum() + area_r.sum()))


def hausdorff95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """The larger of the two directed 95th percentiles of surface distance, weighted by area, in mm.

    Both empty: NaN. One empty: the image's diagonal.
    """
    empty = _empty(prediction, reference)
    if empty is not None:
        diagonal = float(np.linalg.norm(np.asarray(prediction.shape) * np.asarray(spacing)))
        return float("nan") if empty == "both" else diagonal
    to_reference, area_p, to_prediction, area_r = _distances(prediction, reference, spacing)
    return max(_percentile(to_reference, area_p), _percentile(to_prediction, area_r))


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds a mask that is not empty."""
    axes = range(mask.ndim)
    spans = [np.flatnonzero(mask.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


def _empty(prediction: np.ndarray, reference: np.ndarray) -> str | None:
    prediction, reference = _pair(prediction, reference)
    some = (bool(prediction.any()), bool(reference.any()))
    return {(False, False): "both", (True, True): None}.get(some, "one")


def _percentile(distance: np.ndarray, area: np.ndarray, share: float = 0.95) -> float:
    order = np.argsort(distance)
    cumulative = np.cumsum(area[order]) / area.sum()
    return float(distance[order][min(int(np.searchsorted(cumulative, share)), len(order) - 1)])


def _distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distances and areas of the prediction's elements to the reference, and the other way round."""
    prediction, reference = _pair(prediction, reference)
    box = bounding_box(prediction | reference)
    codes = [_corner_codes(np.pad(mask[box], 1)) for mask in (prediction, reference)]
    areas = _areas(tuple(float(s) for s in spacing))
    surfaces = [(code != 0) & (code != 255) for code in codes]
    to_reference = ndimage.distance_transform_edt(~surfaces[1], sampling=spacing)[surfaces[0]]
    to_prediction = ndimage.distance_transform_edt(~surfaces[0], sampling=spacing)[surfaces[1]]
    return to_reference, areas[codes[0][surfaces[0]]], to_prediction, areas[codes[1][surfaces[1]]]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """One bit for each corner of every 2×2×2 cube, as uint8."""
    code = np.zeros(tuple(n - 1 for n in mask.shape), dtype=np.uint8)
    for bit, (a, b, c) in enumerate(np.ndindex(2, 2, 2)):
        part = mask[a : a + code.shape[0], b : b + code.shape[1], c : c + code.shape[2]]
        code |= part.astype(np.uint8) << np.uint8(bit)
    return code


@lru_cache(maxsize=16)
def _areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Area in mm² of the surface inside a cube, for each of the 256 corner patterns.

    The surface of a pattern is made of one polygon for each connected group of inside corners (and, where the
    outside corners fall apart instead, for each of those), through the midpoints of the cut edges.
    """
    from skimage.measure import marching_cubes, mesh_surface_area

    areas = np.zeros(256)
    for code in range(1, 255):
        corners = np.array([(code >> bit) & 1 for bit in range(8)], dtype=np.float32).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(corners, 0.5, spacing=spacing)
        areas[code] = mesh_surface_area(vertices, faces)
    return areas
