"""Where the slices of a stack lie: their order, the line their positions form, and steps along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.dicom.slices import Slice

# Corners of slices are at most this far, in mm, from where the volume puts them.
TOLERANCE = 0.08
# Distances that differ by at most this from multiples of one step are regular; it allows for positions that are
# rounded to 0.1 mm.
_REGULAR = 0.06
# Positions that differ by less than this, in mm, are one place.
_SAME_PLACE = 0.01
# Gantries tilt by up to 30°; a larger angle between the positions' line and the slices is an error.
_LARGEST_SHEAR = 1.0
# The patient's table is shorter than this, in mm.
_LONGEST = 4000.0


@dataclass(frozen=True)
class Layout:
    """Where the slices of a stack lie. Vectors are LPS mm.

    Attributes:
        places: For every place along the line, the indices of the slices that lie there; more than one are duplicates.
        column_step: (3,) from a pixel to the next in its row.
        row_step: (3,) from a pixel to the next in its column.
        origin: (3,) the first pixel of the first slice.
        direction: (3,) the unit vector of the line of positions; oblique to the slices where the gantry is tilted.
        distances: (places,) of each place from the first along `direction`, in mm.
        step: The distance between slices in mm where it is the same everywhere, else None.
    """

    places: list[list[int]]
    column_step: np.ndarray
    row_step: np.ndarray
    origin: np.ndarray
    direction: np.ndarray
    distances: np.ndarray
    step: float | None

    @property
    def typical_step(self) -> float:
        """The median distance between slices in mm, the lower one of an even number."""
        steps = np.sort(np.diff(self.distances))
        return float(steps[(len(steps) - 1) // 2]) if len(steps) else float(self.step or 0)

    @property
    def tilt(self) -> float:
        """The angle between the line of positions and the normal of the slices in degrees."""
        normal = np.cross(self.column_step, self.row_step)
        cosine = self.direction @ normal / np.linalg.norm(normal)
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    @property
    def is_sheared(self) -> bool:
        """Whether the tilt moves the last slice by more than the tolerance."""
        return bool(np.sin(np.radians(self.tilt)) * self.distances[-1] > TOLERANCE)

    def affine(self, step: float) -> np.ndarray:
        """Returns the (4, 4) affine from (column, row, plane) to RAS mm, for planes `step` mm apart."""
        affine = np.eye(4)
        affine[:3] = np.stack([self.column_step, self.row_step, self.direction * step, self.origin], axis=1)
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def lay_out(slices: Sequence[Slice], where: Path) -> Layout:
    """Finds the order and the places of slices from ImagePositionPatient and ImageOrientationPatient of each.

    Args:
        slices: Slices of one size, pixel spacing and orientation.
        where: The folder, for errors.

    Raises:
        InputError: The positions are not on one line, or orientations differ, by more than 0.08 mm at a corner; the
            line is not that of a CT; a single slice has no thickness.
    """
    positions = np.stack([image.position for image in slices]).astype(np.float64)  # type: ignore[misc]
    orientations = np.stack([image.orientation for image in slices]).astype(np.float64)  # type: ignore[misc]
    spacings = np.stack([image.pixel_spacing for image in slices]).astype(np.float64)  # type: ignore[misc]
    row, column = orientations[:, :3].mean(0), orientations[:, 3:].mean(0)
    row_spacing, column_spacing = spacings.mean(0)
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    places = _places(slices, positions, normal, where)
    first = positions[[place[0] for place in places]]
    if len(places) == 1:
        step = slices[0].thickness
        if not step or step <= 0:
            raise InputError(
                "the series has one slice and no thickness, so it is no volume",
                where=str(where),
                hint="give the whole series",
            )
        origin, direction, distances = first[0], normal, np.zeros(1)
    else:
        origin, direction, distances, step = _line(first, normal, row, column, where)
    layout = Layout(places, row * column_spacing, column * row_spacing, origin, direction, distances, step)
    _check_corners(layout, slices, where)
    return layout


def _places(slices: Sequence[Slice], positions: np.ndarray, normal: np.ndarray, where: Path) -> list[list[int]]:
    """Groups the indices of slices by place, along the normal; slices at one place are sorted by acquisition."""
    heights = positions @ normal
    places: list[list[int]] = []
    for index in np.argsort(heights, kind="stable"):
        if places and heights[index] - heights[places[-1][0]] < _SAME_PLACE:
            places[-1].append(int(index))
        else:
            places.append([int(index)])
    for place in places:
        apart = np.linalg.norm(positions[place] - positions[place[0]], axis=1).max()
        if apart >= 2 * _SAME_PLACE:
            raise InputError(
                f"slices at one height are shifted in their plane by {apart:.1f} mm, as {slices[place[-1]].name}",
                where=str(where),
                hint="these are images of several series: put each series into a folder of its own",
            )
        place.sort(key=lambda index: slices[index].order)
    return places


def _line(
    positions: np.ndarray, normal: np.ndarray, row: np.ndarray, column: np.ndarray, where: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float | None]:
    """Fits a line to the positions of slices, in order along the normal.

    Returns:
        The first position, the direction, the distances along it, and the step where it is regular, else None.
    """
    heights = positions @ normal
    # A fit by medians first: a few shifted slices would turn a fit by least squares.
    in_plane = positions @ np.stack([row, column], axis=1)
    slopes = np.median(np.diff(in_plane, axis=0) / np.diff(heights)[:, None], axis=0)
    off = in_plane - slopes * heights[:, None]
    off = np.linalg.norm(off - np.median(off, axis=0), axis=1)
    if np.hypot(*slopes) > _LARGEST_SHEAR:
        raise InputError(
            f"the slices are shifted in their plane by {np.hypot(*slopes):.1f} mm per mm: no gantry is tilted so far",
            where=str(where),
            hint="ImagePositionPatient is wrong, or these are not slices of one volume",
        )
    if off.max() > 1.0:
        raise InputError(
            f"{int((off > 1).sum())} of {len(off)} slices are shifted in their plane, by up to {off.max():.1f} mm",
            where=str(where),
            hint="ImagePositionPatient is wrong, or these are slices of several volumes: separate them",
        )
    centred = heights - heights.mean()
    slope = (centred @ (positions - positions.mean(0))) / (centred @ centred)
    length = float(np.linalg.norm(slope))
    direction = slope / length
    distances = (heights - heights[0]) * length
    if distances[-1] > _LONGEST:
        raise InputError(
            f"the slices span {distances[-1]:.0f} mm, more than a patient's table",
            where=str(where),
            hint="ImagePositionPatient is wrong: remove the slices that lie far from the others",
        )
    origin = positions.mean(0) - centred.mean() * slope + (heights[0] - heights.mean()) * slope
    step, start = np.polyfit(np.arange(len(distances)), distances, 1)
    if np.abs(start + step * np.arange(len(distances)) - distances).max() > _REGULAR:
        return origin, direction, distances, None
    return origin + start * direction, direction, step * np.arange(len(distances)), float(step)


def _check_corners(layout: Layout, slices: Sequence[Slice], where: Path) -> None:
    """Checks that the corners of every slice by its own header lie where the layout puts them."""
    rows, columns = slices[0].header.rows, slices[0].header.columns
    corners = np.array([[i, j] for i in (0, columns - 1) for j in (0, rows - 1)], dtype=np.float64)
    worst, worst_slice = 0.0, slices[0]
    for place, distance in zip(layout.places, layout.distances, strict=True):
        expected = layout.origin + distance * layout.direction
        expected = expected + corners @ np.stack([layout.column_step, layout.row_step])
        for index in place:
            image = slices[index]
            assert image.position is not None and image.orientation is not None and image.pixel_spacing is not None
            steps = image.orientation.reshape(2, 3) * image.pixel_spacing[::-1, None]
            error = float(np.linalg.norm(image.position + corners @ steps - expected, axis=1).max())
            if error > worst:
                worst, worst_slice = error, image
    if worst > TOLERANCE:
        raise InputError(
            f"slices are shifted or turned in their plane by up to {worst:.2f} mm, as {worst_slice.name}",
            where=str(where),
            hint="ImagePositionPatient or ImageOrientationPatient is wrong, or these are slices of several volumes",
        )
