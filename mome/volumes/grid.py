"""A voxel grid in the world, and an array on it. World coordinates are RAS+ in mm, as in NIfTI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mome.errors import InputError


@dataclass(frozen=True)
class Grid:
    """Shape (i, j, k) and the affine (4, 4) float64 from voxel centres to RAS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along the three array axes in mm."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))  # type: ignore[return-value]

    @property
    def orientation(self) -> str:
        """Three letters: the direction that each array axis runs to, most nearly."""
        return "".join("LR PA IS".split()[axis][int(sign > 0)] for axis, sign in closest_axes(self.affine))

    def crop(self, axis: int, start: int, stop: int) -> Grid:
        """The planes `start`…`stop` − 1 along one axis."""
        affine, shape = self.affine.copy(), list(self.shape)
        affine[:3, 3] += start * affine[:3, axis]
        shape[axis] = stop - start
        return Grid(tuple(shape), affine)  # type: ignore[arg-type]

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Equal shape, and corners within `tolerance` voxels."""
        if tuple(self.shape) != tuple(other.shape):
            return False
        move = np.linalg.inv(self.affine) @ other.affine
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
        corners[:, :3] *= np.asarray(self.shape) - 1
        return bool(np.abs((corners @ move.T - corners)[:, :3]).max() <= tolerance)


@dataclass(frozen=True)
class Volume:
    """An array on a grid.

    Attributes:
        array: (i, j, k), float32 HU for CT.
        affine: (4, 4) float64, voxel centres to RAS mm.
        header: What a writer needs to give the same grid back: `sform_code`, `qform_code`, `xyzt_units`.
        notes: What the reader had to decide or repair, for the user.
    """

    array: np.ndarray
    affine: np.ndarray
    header: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        """Shape and affine."""
        return Grid(tuple(self.array.shape), self.affine)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(i, j, k)."""
        return self.grid.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm."""
        return self.grid.spacing


def closest_axes(affine: np.ndarray) -> list[tuple[int, float]]:
    """For every array axis, the world axis it runs along and its sign; every world axis is used once."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, result = directions.copy(), [(0, 0.0)] * 3
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(np.abs(left))), left.shape)
        result[axis] = (int(world), float(np.sign(directions[world, axis])))
        left[world, :] = 0
        left[:, axis] = 0
    return result


def network_grid(grid: Grid, *, spacing: tuple[float, float, float], orientation: str = "RAS") -> Grid:
    """The grid of the wanted spacing and axis directions that covers `grid`, rotated as it is.

    An oblique scan stays oblique: only axes are permuted and flipped and the spacing changed, so that nothing
    is interpolated that need not be. Voxels are cubes of space: the outer faces of the two grids agree, up to
    less than one voxel at the far side.

    Args:
        grid: To be covered.
        spacing: Wanted voxel size in mm along the axes of `orientation`.
        orientation: As in "RAS": the direction of each axis of the result.

    Raises:
        InputError: `orientation` does not name three different directions.
    """
    pairs = {"L": (0, -1), "R": (0, 1), "P": (1, -1), "A": (1, 1), "I": (2, -1), "S": (2, 1)}
    letters = orientation.upper()
    if len(letters) != 3 or any(c not in pairs for c in letters) or len({pairs[c][0] for c in letters}) != 3:
        raise InputError(f"orientation names three directions, as in RAS, got {orientation!r}")
    here = closest_axes(grid.affine)
    affine, shape = np.eye(4), []
    corner = grid.affine @ np.array([-0.5, -0.5, -0.5, 1.0])  # outer corner of the first voxel
    origin = corner[:3].copy()
    for axis, letter in enumerate(letters):
        world, sign = pairs[letter]
        source = next(i for i, (w, _) in enumerate(here) if w == world)
        length = grid.shape[source] * grid.spacing[source]
        direction = grid.affine[:3, source] / grid.spacing[source]
        if here[source][1] != sign:  # start from the other end
            origin = origin + direction * length
            direction = -direction
        # Less than 0.1 % of a voxel more must not add a plane: spacings are stored rounded.
        shape.append(max(1, int(np.ceil(length / spacing[axis] - 1e-3))))
        affine[:3, axis] = direction * spacing[axis]
    affine[:3, 3] = origin + affine[:3, :3] @ np.full(3, 0.5)
    return Grid(tuple(shape), affine)  # type: ignore[arg-type]
