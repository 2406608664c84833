"""Fills the voxels that a label map does not name: the outline of the body, its fat, muscle and bone.

A label map of organs leaves most of a body unlabelled. All rules here are our choice.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

# Ids of fillings; the ids of the class table are smaller.
FAT, MUSCLE, INNER, SOFT, BONE, SKIN, GAS, LUNG = 200, 201, 202, 203, 204, 205, 206, 207
OUTSIDE_MM = 60.0  # farther than this from the inner body lies air, whatever the thickness of the fat

_COARSE_MM = 6.0  # of the grid on which outlines are smoothed
_FAT_HU, _BONE_HU, _GAS_HU = -30.0, 160.0, -400.0
_SKIN_MM = 6.0


def fill_from_labels(ids: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Fills a label map without a CT.

    The inner body is the convex hull of all labels in each axial plane, smoothed from plane to plane. Its unlabelled
    voxels become `INNER`, a mixture of fat, vessels and connective tissue that is drawn anew for every image.

    Args:
        ids: uint8 (i, j, k), 0 where nothing is labelled.
        spacing: Voxel side in mm.

    Returns:
        The filled ids, and the mask (i, j, k) of the inner body.
    """
    inner = hull_of(ids, spacing)
    filled = ids.copy()
    filled[inner & (ids == 0)] = INNER
    return filled, inner


def hull_of(ids: np.ndarray, spacing: float) -> np.ndarray:
    """Returns the mask (i, j, k) of the convex hull of all labels in each axial plane, smooth from plane to plane."""
    step = max(int(round(_COARSE_MM / spacing)), 1)
    coarse = ids[::step, ::step, ::step] > 0
    coarse = ndimage.binary_closing(coarse, iterations=3) | coarse
    hull = np.zeros(coarse.shape, dtype=np.float32)
    planes = [k for k in range(coarse.shape[2]) if np.count_nonzero(coarse[:, :, k]) > 4]
    for k in planes:
        hull[:, :, k] = convex_hull_image(coarse[:, :, k])
    areas = hull.sum(axis=(0, 1))
    broad = [k for k in planes if areas[k] >= 0.7 * np.percentile(areas[planes], 75)]
    for k in range(coarse.shape[2]):  # planes with few labels get the outline of the nearest one with many
        if k not in broad and broad:
            hull[:, :, k] = np.maximum(hull[:, :, k], hull[:, :, min(broad, key=lambda other: abs(other - k))])
    smooth = ndimage.gaussian_filter(hull, (1.0, 1.0, 2.0), mode="nearest")
    zoom = [size / small for size, small in zip(ids.shape, coarse.shape, strict=True)]
    inner = ndimage.zoom(smooth, zoom, order=1, grid_mode=True, mode="nearest") > 0.5
    return inner | (ids > 0)


def fill_from_ct(ids: np.ndarray, hu: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Fills a label map by thresholds of its CT.

    The body is the largest object above −300 HU after a thin table was removed, with its holes filled.

    Args:
        ids: uint8 (i, j, k), 0 where nothing is labelled.
        hu: float32 (i, j, k).
        spacing: Voxel side in mm.

    Returns:
        The filled ids, without the skin, and the mask (i, j, k) of the inner body, as of `fill_from_labels`.
    """
    dense = ndimage.binary_opening(hu > -300, iterations=max(int(round(6 / spacing)), 1))
    parts, count = ndimage.label(dense)
    if count:
        sizes = np.bincount(parts.ravel())[1:]
        dense = parts == 1 + int(np.argmax(sizes))
    body = np.stack([ndimage.binary_fill_holes(dense[:, :, k]) for k in range(dense.shape[2])], axis=2)
    body |= ids > 0
    tissue = np.where(hu < _GAS_HU, GAS, np.where(hu < _FAT_HU, FAT, np.where(hu < _BONE_HU, MUSCLE, BONE)))
    filled = ids.copy()
    rest = body & (ids == 0)
    filled[rest] = tissue[rest]
    deep = ndimage.binary_erosion(body, iterations=max(int(round(_SKIN_MM / spacing)), 1), border_value=1)
    filled[body & ~deep & (ids == 0)] = FAT
    return filled, hull_of(ids, spacing)


def outer_distance(inner: np.ndarray, spacing: float) -> np.ndarray:
    """Returns the distance in mm to the surface of a mask, negative inside, as float32 (i, j, k)."""
    outside = ndimage.distance_transform_edt(~inner) * spacing
    inside = ndimage.distance_transform_edt(inner) * spacing
    return (outside - inside).astype(np.float32)


def add_spine_and_lungs(ids: np.ndarray, aorta: int, spacing: float) -> np.ndarray:
    """Draws a spine and the bases of the lungs into a label map of abdominal organs that has neither.

    The spine is a rod of bone behind the aorta. Lung lies above the organs, inside the hull of all labels.

    Args:
        ids: uint8 (i, j, k), RAS.
        aorta: Id of the aorta.
        spacing: Voxel side in mm.

    Returns:
        The ids with `BONE` and `LUNG`; unchanged if no voxel is the aorta's.
    """
    planes = np.flatnonzero((ids == aorta).any(axis=(0, 1)))
    if not len(planes):
        return ids
    drawn = ids.copy()
    organs = np.flatnonzero((ids > 0).any(axis=(1, 2)))
    middle = (organs[0] + organs[-1]) / 2
    i, j = np.ogrid[: ids.shape[0], : ids.shape[1]]
    centres = []
    for k in planes:
        where = np.argwhere(ids[:, :, k] == aorta)
        centres.append((0.5 * where[:, 0].mean() + 0.5 * middle, where[:, 1].mean() - 30 / spacing))
    smooth = ndimage.gaussian_filter1d(np.asarray(centres), 20 / spacing, axis=0, mode="nearest")
    for plane in range(ids.shape[2]):
        ci, cj = smooth[int(np.argmin(np.abs(planes - plane)))]
        rod = ((i - ci) ** 2 + (j - cj) ** 2) < (20 / spacing) ** 2
        rod |= (np.abs(i - ci) < 6 / spacing) & (j < cj) & (j > cj - 45 / spacing)
        drawn[:, :, plane][rod & (ids[:, :, plane] == 0)] = BONE
    inner = outer_distance(hull_of(drawn, spacing), spacing)
    height = np.arange(ids.shape[2])[None, None, :]
    top = np.where(ids > 0, height, -1).max(axis=2).astype(np.float32)
    weight = ndimage.gaussian_filter((top >= 0).astype(np.float32), 16 / spacing)
    level = ndimage.gaussian_filter(np.where(top >= 0, top, 0), 16 / spacing) / np.maximum(weight, 1e-3)
    level = np.maximum(np.where(top >= 0, top, level), planes.mean())
    lungs = (drawn == 0) & (inner < -6) & (height > level[:, :, None] + 2)
    drawn[lungs] = LUNG
    return drawn
