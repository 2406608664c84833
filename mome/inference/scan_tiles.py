"""Tiles of an upright network grid that do not touch the turned scan inside of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np

from mome.inference.stream import Box
from mome.volumes import Grid
from mome.volumes.axis_sampling import parallel_axes


def tiles_of_scan(network: Grid, scan: Grid) -> Callable[[Box], bool] | None:
    """Returns what says whether a tile holds a voxel that the scan's masks read; None where the grids are parallel.

    Leaving the other tiles out changes no mask.

    Args:
        network: The grid of the tiles.
        scan: The scan's grid.
    """
    if parallel_axes(network, scan) is not None:
        return None
    to_scan = np.linalg.inv(scan.affine) @ network.affine
    last = np.asarray(scan.shape) - 1.0

    def touches(tile: Box) -> bool:
        # A voxel of the scan reads network voxels that are less than one voxel away along each network axis.
        corners = np.array([[*corner, 1.0] for corner in product(*((a - 1.0, b) for a, b in tile))])
        places = (corners @ to_scan.T)[:, :3]
        return bool(((places.max(axis=0) >= 0) & (places.min(axis=0) <= last)).all())

    return touches
