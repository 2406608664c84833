"""A coarse mask of the patient, which decides the tiles that the network sees.

Air and the table hold no structure. Of the tiles over the whole scan, those that hold nothing of the patient are left
out. All thresholds are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from mome.inference.stream import Box
from mome.inference.tiles import tile_starts, tile_steps
from mome.volumes import Grid, Volume

# Tissue is denser than this; air, and the lungs apart from their vessels, are not.
_TISSUE_HU = -300.0
# Voxels of the coarse mask. A table or a hand is larger than the smallest piece that is kept.
_COARSE_MM, _SMALLEST_PIECE_ML = 4.0, 50.0
# Around the patient, so that skin and what is near it is inside.
MARGIN_MM = 12.0


@dataclass(frozen=True)
class BodyMask:
    """Where the patient is on the network grid.

    Attributes:
        box: First and last + 1 voxel of the network grid along each axis, around all tiles that are kept.
        grid: The network grid inside of the box.
        tissue: Bool on a coarse grid, where the patient is denser than air.
        reach: Voxels of the coarse grid along each axis that belong to the mask around the patient.
        affine: (4, 4), from voxels of `grid` to voxels of the coarse grid.
    """

    box: Box
    grid: Grid
    tissue: np.ndarray
    reach: tuple[int, ...]
    affine: np.ndarray

    @cached_property
    def filled(self) -> np.ndarray:
        """Returns `tissue` with its holes, such as lungs."""
        return _filled(self.tissue)

    def wants(self, tile: Box) -> bool:
        """Says whether a tile, given by its first and last + 1 voxel in `grid`, may hold a part of the patient."""
        corners = np.array([[a, b - 1.0] for a, b in tile])
        places = np.array([[*point, 1.0] for point in np.stack(np.meshgrid(*corners), -1).reshape(-1, 3)])
        at = (places @ self.affine.T)[:, :3]
        low = np.clip(np.floor(at.min(axis=0)).astype(int), 0, self.tissue.shape)
        high = np.clip(np.ceil(at.max(axis=0)).astype(int) + 1, 0, self.tissue.shape)
        if (low >= high).any():
            return False
        reached = tuple(slice(max(0, a - n), b + n) for a, b, n in zip(low, high, self.reach, strict=True))
        # Holes are filled, which takes longer than all else, only where a tile holds no tissue.
        return bool(self.tissue[reached].any()) or bool(self.filled[reached].any())


def body_mask(volume: Volume, network: Grid, patch: tuple[int, int, int], overlap: float) -> BodyMask | None:
    """Returns where the patient is, or None where nothing of the scan is denser than air.

    Every few voxels of the scan are compared with −300 HU. Holes within planes, such as lungs, are filled; pieces of
    less than 50 ml are left out; 12 mm around the rest belong to the mask.

    Args:
        volume: The scan in HU.
        network: The network grid.
        patch: Voxels (D, H, W) of a tile.
        overlap: The share of a tile that its neighbour covers too.
    """
    tissue, to_volume = coarse_mask(volume, _TISSUE_HU)
    if not tissue.any():
        return None
    coarse_mm = np.asarray(volume.spacing) * to_volume.diagonal()[:3]
    reach = tuple(max(1, int(np.ceil(MARGIN_MM / step))) for step in coarse_mm)
    coarse_to_network = np.linalg.inv(network.affine) @ volume.affine @ to_volume
    box = _box(tissue, reach, coarse_to_network, network.shape, patch, overlap)
    grid = network
    for axis, (first, last) in enumerate(box):
        grid = grid.crop(axis, first, last)
    affine = np.linalg.inv(volume.affine @ to_volume) @ grid.affine
    return BodyMask(box, grid, tissue, reach, affine)


def coarse_mask(volume: Volume, above_hu: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns where every few voxels of a scan are denser than a value, in pieces of at least 50 ml.

    The largest piece is kept where all are smaller.

    Args:
        volume: The scan in HU.
        above_hu: What is kept is denser than this.

    Returns:
        Bool on a coarse grid, and the affine (4, 4) from its voxels to those of the scan.
    """
    steps = [max(1, int(_COARSE_MM / step)) for step in volume.spacing]
    mask = volume.array[:: steps[0], :: steps[1], :: steps[2]] > above_hu
    pieces, count = ndimage.label(mask)
    if count:
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        voxel_ml = float(np.prod(np.asarray(volume.spacing) * steps)) / 1000
        kept = sizes >= min(_SMALLEST_PIECE_ML / voxel_ml, sizes.max())
        mask = kept[pieces]
    return mask, np.diag([*map(float, steps), 1.0])


def _filled(tissue: np.ndarray) -> np.ndarray:
    """Returns a mask with the holes of its planes along every axis."""
    filled = tissue.copy()
    for axis in range(3):  # lungs are open where the scan ends, so that no one direction closes all holes
        for plane, target in zip(np.moveaxis(tissue, axis, 0), np.moveaxis(filled, axis, 0), strict=True):
            target |= ndimage.binary_fill_holes(plane)
    return filled


def _box(
    tissue: np.ndarray,
    reach: tuple[int, ...],
    coarse_to_network: np.ndarray,
    size: tuple[int, int, int],
    patch: tuple[int, ...],
    overlap: float,
) -> Box:
    """Returns the box of all tiles of the whole network grid that reach into the box of a coarse mask.

    The mask is `tissue` with what is around it; holes of tissue change no box.

    Tiles keep the places that they have without a mask, because a network's result depends a little on where a tile
    begins.
    """
    ends = []
    for axis in range(3):
        profile = np.flatnonzero(tissue.any(axis=tuple(other for other in range(3) if other != axis)))
        first, last = max(0, profile[0] - reach[axis]), min(tissue.shape[axis] - 1, profile[-1] + reach[axis])
        ends.append((first - 1.0, last + 1.0))  # to the next voxels that were looked at
    corners = np.array([[a, b, c, 1.0] for a in ends[0] for b in ends[1] for c in ends[2]])
    at = (corners @ coarse_to_network.T)[:, :3]
    box, steps = [], tile_steps(size, patch, overlap)
    for axis, (low, high) in enumerate(zip(at.min(axis=0), at.max(axis=0), strict=True)):
        first, last = max(0, int(np.floor(low))), min(size[axis], int(np.ceil(high)) + 1)
        starts = tile_starts(size[axis], patch[axis], steps[axis])
        inside = [start for start in starts if start < last and start + patch[axis] > first] or starts
        box.append((inside[0], min(size[axis], inside[-1] + patch[axis])))
    return box[0], box[1], box[2]
