"""Grids along the axes of the patient, for scans whose own axes are turned."""

from __future__ import annotations

from itertools import product

import numpy as np

from mome.volumes.grid import Grid
from mome.volumes.orientation import closest_axes, parse_orientation
from mome.volumes.sizes import check_size


def rotation_degrees(grid: Grid) -> float:
    """Returns the angle by which a grid is turned against the axes of the patient, in degrees.

    It is the angle of the rotation in the polar decomposition of the grid's directions, after these are permuted and
    flipped to the closest axes of the patient. A gantry tilt, which turns one axis of three, counts half.
    """
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    along = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(closest_axes(grid.affine)):
        along[:, world] = sign * directions[:, axis]
    left, _, right = np.linalg.svd(along)
    rotation = left @ right
    twice = rotation - rotation.T
    # The cosine alone is inexact for small angles.
    return float(np.degrees(np.arctan2(np.linalg.norm(twice[[2, 0, 1], [1, 2, 0]]), np.trace(rotation) - 1)))


def upright_grid(grid: Grid, *, spacing: tuple[float, float, float], orientation: str = "RAS") -> Grid:
    """Returns the smallest grid along the axes of the patient that covers `grid`; both have the same centre.

    Args:
        grid: The grid to cover; it may be turned and sheared.
        spacing: The voxel size in mm along the axes of `orientation`.
        orientation: The direction of each axis of the result, as in "RAS".

    Raises:
        InputError: `orientation` is not three letters for three directions, or the result would be too large.
    """
    check_size(grid.shape, affine=grid.affine)
    faces = [(-0.5, side - 0.5) for side in grid.shape]
    corners = np.array([[*corner, 1.0] for corner in product(*faces)]) @ grid.affine.T
    low, high = corners[:, :3].min(axis=0), corners[:, :3].max(axis=0)
    affine, sides = np.eye(4), []
    for axis, (world, sign) in enumerate(parse_orientation(orientation)):
        # Rounded headers must not add a plane, as in `network_grid`.
        sides.append(max(1.0, float(np.ceil((high - low)[world] / spacing[axis] - 1e-3))))
        affine[:3, axis] = 0
        affine[world, axis] = sign * spacing[axis]
    check_size(
        sides,
        what=f"at a spacing of {'×'.join(f'{step:.6g}' for step in spacing)} mm, the network's grid of the turned scan",
        hint="a processor with a larger spacing, or a part of the scan",
    )
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((np.array(sides) - 1) / 2)
    return Grid(tuple(int(side) for side in sides), affine)  # type: ignore[arg-type]
