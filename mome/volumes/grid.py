"""Voxel grids and volumes. World coordinates are RAS+ in mm, as in NIfTI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.volumes.orientation import closest_axes, orientation_letters, parse_orientation
from mome.volumes.sizes import LARGEST_VOXEL_MM, check_size

# Spacings are computed from headers in float32. Lengths that differ by this share are the same, and so are volumes that
# differ by three times of it.
SPACING_ROUNDING = 1e-5
# Beyond this cosine, axes are not at right angles, as those of a scan with a tilted gantry.
SMALLEST_SHEAR = 1e-3


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxels.

    Attributes:
        shape: Voxels along the array axes (i, j, k).
        affine: (4, 4) float64, from voxel indices (at voxel centres) to RAS mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Returns the voxel size along the three array axes in mm."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))  # type: ignore[return-value]

    @property
    def shear(self) -> float:
        """Returns the largest cosine between two array axes: 0 where they are at right angles."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(np.abs(directions.T @ directions - np.eye(3)).max())

    @property
    def orientation(self) -> str:
        """Returns three letters, as in "RAS": the direction that is closest to each array axis."""
        return orientation_letters(closest_axes(self.affine))

    def crop(self, axis: int, start: int, stop: int) -> Grid:
        """Returns the grid of the planes `start` to `stop` − 1 along one array axis."""
        affine, shape = self.affine.copy(), list(self.shape)
        affine[:3, 3] += start * affine[:3, axis]
        shape[axis] = stop - start
        return Grid(tuple(shape), affine)  # type: ignore[arg-type]

    def same_as(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Says whether both grids have the same shape, and corners that are at most `tolerance` voxels apart."""
        if tuple(self.shape) != tuple(other.shape):
            return False
        other_to_self = np.linalg.inv(self.affine) @ other.affine
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
        corners[:, :3] *= np.asarray(self.shape) - 1
        return bool(np.abs((corners @ other_to_self.T - corners)[:, :3]).max() <= tolerance)

    def difference(self, other: Grid) -> str:
        """Says in words where two grids differ: shape, spacing, directions, origin; empty where they do not.

        Spacings are compared to 1e-3 of their size, directions to 0.01° and origins to 0.01 mm.
        """
        parts = []
        if tuple(self.shape) != tuple(other.shape):
            parts.append(f"shape {_times(self.shape)} and {_times(other.shape)}")
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3, atol=0):
            parts.append(f"spacing {_times(self.spacing)} and {_times(other.spacing)} mm")
        if self.orientation != other.orientation:
            parts.append(f"axes run to {self.orientation} and {other.orientation}")
        else:
            angle = _angle(self.affine, other.affine)
            if angle > 0.01:
                parts.append(f"directions {angle:.3g}° apart")
        apart = self.affine[:3, 3] - other.affine[:3, 3]
        if np.abs(apart).max() > 0.01:
            here, there = (", ".join(f"{v:.2f}" for v in grid.affine[:3, 3]) for grid in (self, other))
            parts.append(f"origin ({here}) and ({there}), {np.linalg.norm(apart):.3g} mm apart")
        if not parts and not self.same_as(other, tolerance=0):
            parts.append("by rounding, which adds up to more than a hundredth of a voxel at a corner")
        return "; ".join(parts)


@dataclass(frozen=True)
class Volume:
    """An array with its affine.

    Attributes:
        array: (i, j, k), float32 HU for CT, whole numbers for a label map.
        affine: (4, 4) float64, from voxel indices (at voxel centres) to RAS mm.
        header: NIfTI fields that a writer copies into masks: `sform_code`, `qform_code`, `xyzt_units`, and for a scan
            that is NIfTI `transforms`, all fields that say where its voxels are (`NiftiHeader.transforms`). For a scan
            that is DICOM, `dicom` holds the slices it was read from (`mome.volumes.dicom.source`).
        notes: Sentences for the user about decisions and repairs of the reader.
        checksum: Of the voxels and the affine that `checked_volume` has checked; it does not check them again.
    """

    array: np.ndarray
    affine: np.ndarray
    header: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    checksum: int | None = field(default=None, repr=False, compare=False)

    @property
    def grid(self) -> Grid:
        """Returns the grid of the array."""
        return Grid(tuple(self.array.shape), self.affine)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns the voxels along the array axes (i, j, k)."""
        return self.grid.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Returns the voxel size along the three array axes in mm."""
        return self.grid.spacing


def network_grid(grid: Grid, *, spacing: tuple[float, float, float], orientation: str = "RAS") -> Grid:
    """Returns the grid of the wanted spacing and axis directions that covers `grid` and keeps its rotation.

    An oblique scan stays oblique: axes are only permuted and flipped and the spacing is changed, which avoids
    interpolation where the spacing stays the same. The outer faces of the first voxels coincide; at the far side the
    result reaches less than one voxel beyond `grid`.

    Args:
        grid: The grid to cover.
        spacing: The voxel size in mm along the axes of `orientation`.
        orientation: The direction of each axis of the result, as in "RAS".

    Raises:
        InputError: `orientation` is not three letters for three directions, a spacing is not above 0 or above
            `LARGEST_VOXEL_MM`, or the result would be too large.
    """
    if not all(0 < step <= LARGEST_VOXEL_MM for step in spacing):
        raise InputError(
            f"the network's voxels are {_times(spacing)} mm large; the limit is {LARGEST_VOXEL_MM:g} mm",
            hint="is the spacing of the checkpoint's processor right?",
        )
    check_size(grid.shape, affine=grid.affine)
    here = closest_axes(grid.affine)
    affine, sides = np.eye(4), []
    corner = grid.affine @ np.array([-0.5, -0.5, -0.5, 1.0])  # outer corner of the first voxel
    origin = corner[:3].copy()
    for axis, (world, sign) in enumerate(parse_orientation(orientation)):
        source = next(i for i, (w, _) in enumerate(here) if w == world)
        length = grid.shape[source] * grid.spacing[source]
        direction = grid.affine[:3, source] / grid.spacing[source]
        if here[source][1] != sign:  # start from the other end
            origin = origin + direction * length
            direction = -direction
        # Headers store rounded spacings: an excess of less than 0.1 % of a voxel must not add a plane.
        sides.append(max(1.0, float(np.ceil(length / spacing[axis] - 1e-3))))
        affine[:3, axis] = direction * spacing[axis]
    check_size(
        sides,
        what=f"at a spacing of {_times(spacing)} mm, the network's grid of the scan",
        hint="a processor with a larger spacing, or a part of the scan",
    )
    shape = [int(side) for side in sides]
    affine[:3, 3] = origin + affine[:3, :3] @ np.full(3, 0.5)
    return Grid(tuple(shape), affine)  # type: ignore[arg-type]


def _times(values: Sequence[float]) -> str:
    """Returns numbers for a message, as in "1×1×2.5"."""
    return "×".join(f"{value:.6g}" for value in values)


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the largest angle between corresponding axes of two affines, in degrees."""
    first, second = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (one, other))
    sines = np.linalg.norm(np.cross(first, second, axis=0), axis=0)
    return float(np.degrees(np.arctan2(sines, (first * second).sum(axis=0))).max())
