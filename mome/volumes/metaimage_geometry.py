"""The affine of a MetaImage. Source: the documentation of MetaIO; checked against ITK."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mome.volumes.orientation import closest_axes, orientation_letters
from mome.volumes.raw_data import damaged, numbers, spatial_affine

# Names of one field in files of different age.
_MATRIX = ("TransformMatrix", "Rotation", "Orientation")
_ORIGIN = ("Offset", "Position", "Origin")
_SPACING = ("elementspacing", "elementsize")
_UNITS = {"": 1.0, "mm": 1.0, "cm": 10.0, "um": 0.001, "?": 1.0}
_OPPOSITE = str.maketrans("LRPAIS", "RLAPSI")


def metaimage_affine(fields: dict[str, str], dimension: int, path: Path) -> tuple[np.ndarray, list[str]]:
    """Returns the affine to RAS mm as ITK computes it, and notes on what the header leaves open or contradicts.

    A negative `ElementSpacing` reverses the direction of its axis. `DistanceUnits`, which ITK ignores, is used.

    Args:
        fields: Field, in lower case → its text. `elementspacing` or `elementsize` is there.
        dimension: Axes of the array.
        path: The file that errors name.

    Raises:
        InputError: A field is no list of numbers, or two names of one field have different values.
    """
    notes: list[str] = []
    spacing = fields.get(_SPACING[0], fields.get(_SPACING[1], ""))
    steps = np.array(numbers(spacing, dimension, "ElementSpacing", path))
    if (steps[:3] < 0).any():
        notes.append("the header's ElementSpacing is negative: these axes are taken in reverse, as ITK takes them")
    matrix = _only_one(fields, _MATRIX, dimension**2, path)
    origin = _only_one(fields, _ORIGIN, dimension, path)
    if matrix is None:
        notes.append("the header gives no directions: left-posterior-superior is assumed")
    if origin is None:
        notes.append("the header has no 'Offset': the first voxel is taken as the origin")
    # A row is the direction of an array axis.
    directions = np.eye(dimension) if matrix is None else np.reshape(matrix, (dimension, dimension))
    lengths = np.linalg.norm(directions[:3, :3], axis=1)
    if np.isfinite(lengths).all() and not np.allclose(lengths, 1, atol=1e-3):
        shown = ", ".join(f"{length:.4g}" for length in lengths)
        notes.append(f"the rows of the header's TransformMatrix have lengths {shown}, which scale the voxels")
    columns = (directions * steps[:, None])[:3, :3] * _unit(fields, notes, path)
    start = np.array([0.0] * 3 if origin is None else origin[:3]) * _unit(fields, [], path)
    affine = spatial_affine(columns.tolist(), start.tolist(), (-1, -1, 1))  # MetaImage's world is LPS
    notes += _orientation_notes(fields, affine)
    return affine, notes


def _only_one(fields: dict[str, str], names: tuple[str, ...], count: int, path: Path) -> list[float] | None:
    """Returns the numbers of a field that has several names; None where there is none.

    Raises:
        InputError: Two of the names are there, with different numbers.
    """
    found = {name: numbers(fields[name.lower()], count, name, path) for name in names if name.lower() in fields}
    values = list(found.values())
    if any(not np.array_equal(one, values[0], equal_nan=True) for one in values):
        raise damaged(f"{' and '.join(found)} are names of one field, and have different values", path)
    return values[0] if values else None


def _unit(fields: dict[str, str], notes: list[str], path: Path) -> float:
    """Returns the unit in mm. A note is added where it is not mm."""
    unit = fields.get("distanceunits", "").strip().lower()
    if unit not in _UNITS:
        raise damaged(f"'DistanceUnits' is mm, cm or um, here it is {unit[:30]!r}", path)
    if _UNITS[unit] != 1:
        notes.append(f"the header's unit is {unit!r}; it is converted to mm, which ITK does not do")
    return _UNITS[unit]


@np.errstate(all="ignore")
def _orientation_notes(fields: dict[str, str], affine: np.ndarray) -> list[str]:
    """Returns a note where `AnatomicalOrientation` contradicts the directions.

    ITK writes where axes come from ("RAI" for axes to the left, posterior and superior), other programs where they
    run to, so both are accepted.
    """
    named = fields.get("anatomicalorientation", "").strip().upper()
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not named or "?" in named or not np.isfinite(affine).all() or lengths.min() <= 0:
        return []
    letters = orientation_letters(closest_axes(affine))
    if named in (letters, letters.translate(_OPPOSITE)):
        return []
    return [f"the header's AnatomicalOrientation {named[:10]!r} contradicts its directions ({letters}), which are used"]
