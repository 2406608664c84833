"""The network grid of a scan: around the patient where the scan is turned, else around the whole scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from mome.inference.body_mask import MARGIN_MM, coarse_mask
from mome.volumes import Grid, Volume
from mome.volumes.axis_sampling import parallel_axes

if TYPE_CHECKING:
    from mome.processing import MoMEProcessor

# What lies between this and skin is clothes or noise; lungs are denser, so that no part of a patient is cut off.
_AIR_HU = -900.0


def scan_grid(volume: Volume, processor: MoMEProcessor) -> Grid:
    """Returns the network grid of a scan.

    A scan that is turned by more than 10° gets an upright grid, which is cut to the box of all that is denser than air.
    Around the whole turned scan, its corners would hold nothing, and tiles would hold less of the patient than those of
    a scan that is not turned; masks of the bundled models are much worse there (`benchmarks/results/orientations.md`).

    What is cut off is air, and pieces of less than 50 ml, at least 12 mm beside everything else. A scan that holds
    nothing but air, and one whose air is noisy, keep the whole grid.

    Both are continued at their upper and lower end as the processor says (`MoMEProcessor.extended`).

    Args:
        volume: The scan in HU.
        processor: Makes the grid (`MoMEProcessor.network_grid`).

    Raises:
        InputError: The whole grid is too large.
    """
    grid = processor.network_grid(volume.grid)
    if parallel_axes(grid, volume.grid) is not None:
        return processor.extended(grid)
    mask, to_volume = coarse_mask(volume, _AIR_HU)
    edge = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    if not len(edge):
        return processor.extended(grid)
    to_grid = np.linalg.inv(grid.affine) @ volume.affine @ to_volume
    places = edge @ to_grid[:3, :3].T + to_grid[:3, 3]
    # Between two voxels of the coarse mask lies less than one of them that was not looked at.
    unseen_mm = float(np.max(np.asarray(volume.spacing) * to_volume.diagonal()[:3]))
    reach = (MARGIN_MM + unseen_mm) / np.asarray(grid.spacing)
    low, high = places.min(axis=0) - reach, places.max(axis=0) + reach
    for axis, side in enumerate(grid.shape):
        grid = grid.crop(axis, max(0, int(np.floor(low[axis]))), min(side, int(np.ceil(high[axis])) + 1))
    return processor.extended(grid)
