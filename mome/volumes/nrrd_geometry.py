"""The affine of a NRRD file. Source: the definition of the format at teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.raw_data import damaged, numbers, spatial_affine

Vectors = list[list[float] | None]

# The signs that turn a space into RAS.
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
# Spaces of the format that are none of the patient.
_OTHER_SPACES = ("scanner-xyz", "3d-right-handed", "3d-left-handed")
_MM = {
    "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "millimetre": 1.0, "millimetres": 1.0, "": 1.0,
    "m": 1000.0, "meter": 1000.0, "metre": 1000.0, "meters": 1000.0, "metres": 1000.0,
    "cm": 10.0, "centimeter": 10.0, "centimetre": 10.0,
    "um": 0.001, "µm": 0.001, "μm": 0.001, "micron": 0.001, "microns": 0.001, "micrometer": 0.001, "micrometre": 0.001,
}  # fmt: skip
# Spacings that are given twice agree to this share.
_AGREE = 1e-3


def vectors(text: str) -> Vectors | None:
    """Returns the vectors of a field such as `(1,0,0) none (0,1,0)`; None where the text is something else."""
    found: Vectors = []
    for match in re.finditer(r"\s*(?:\(([^()]{0,400})\)|(none))\s*|(.)", text):
        inside, none, other = match.groups()
        if other is not None:
            return None
        try:
            found.append(None if none else [float(word) for word in inside.split(",")])
        except ValueError:
            return None
    return found


def nrrd_affine(
    fields: dict[str, str], dimension: int, spatial: list[int], directions: Vectors | None, path: Path
) -> tuple[np.ndarray, list[str]]:
    """Returns the affine to RAS mm, and notes on what the header leaves open.

    Negative `spacings` reverse the direction of their axis, as ITK reads them. `space units` and `units`, which ITK
    ignores, are used.

    Args:
        fields: Field, in lower case → its text.
        dimension: Axes of the array.
        spatial: The three axes of space.
        directions: The vector of every axis; None where the header has none.
        path: The file that errors name.

    Raises:
        InputError: A field is damaged, two fields contradict each other, the space is none of the format, or the size
            of the voxels is not known.
    """
    notes: list[str] = []
    signs, has_time = _space(fields, notes, path)
    if directions is None and {"units", "space units"} <= fields.keys():
        raise damaged("it has both 'units' and 'space units', and no 'space directions'", path)
    if directions is None:
        columns, origin = _by_spacings(fields, dimension, spatial, notes, path)
    else:
        columns, origin = _by_directions(fields, dimension, spatial, directions, has_time, notes, path)
    affine = spatial_affine(columns, origin, signs)
    affine[:3] *= np.array(_units(fields, "space units", (0, 1, 2), notes, path))[:, None]
    return affine, notes


def _space(fields: dict[str, str], notes: list[str], path: Path) -> tuple[tuple[int, int, int], bool]:
    """Returns the signs that turn the space into RAS, and whether it has an axis of time.

    Raises:
        InputError: The space is none of the format.
    """
    full = fields.get("space", "").lower()
    space = re.sub(r"(-time|(?<=^...)t)$", "", full)
    has_time = space != full or fields.get("space dimension", "").strip() == "4"
    if space in _SPACES:
        return _SPACES[space], has_time
    if "space" in fields and space not in _OTHER_SPACES:
        raise InputError(
            f"the header names the space {fields['space'][:30]!r}, which NRRD does not have: left and right are not "
            "known",
            where=str(path),
            hint="write left-posterior-superior, left-anterior-superior or right-anterior-superior",
        )
    named = f"names the unknown space {fields['space'][:30]!r}" if "space" in fields else "names no space"
    notes.append(f"the header {named}: left-posterior-superior is assumed, left and right may be exchanged")
    return _SPACES["lps"], has_time


def _by_directions(
    fields: dict[str, str], dimension: int, spatial: list[int], directions: Vectors, has_time: bool, notes: list[str],
    path: Path,
) -> tuple[list[list[float]], list[float]]:  # fmt: skip
    """Returns the steps of the axes of space and the centre of the first voxel, from `space directions`."""
    length = 4 if has_time and len(directions[spatial[0]] or []) == 4 else 3
    columns = [directions[axis] or [] for axis in spatial]
    if any(len(column) != length or any(column[3:]) for column in columns):
        raise damaged("'space directions' are no vectors of three numbers", path)
    columns = [column[:3] for column in columns]
    origin = _space_origin(fields, path) if "space origin" in fields else [0.0, 0.0, 0.0]
    if "space origin" not in fields:
        notes.append("the header has no 'space origin': the first voxel is taken as the origin")
    spacings = _per_axis(fields, ("spacings",), dimension, path)
    for axis, column in zip(spatial, columns, strict=True):
        given = math.nan if spacings is None else abs(spacings[axis])
        if math.isfinite(given) and not math.isclose(given, math.hypot(*column), rel_tol=_AGREE):
            raise damaged("'spacings' and 'space directions' give different sizes of voxels", path)
    if {"axis mins", "axismins", "axis maxs", "axismaxs"} & fields.keys():
        notes.append("the header's 'axis mins' and 'axis maxs' are not used, because it has 'space directions'")
    return columns, origin


def _by_spacings(
    fields: dict[str, str], dimension: int, spatial: list[int], notes: list[str], path: Path
) -> tuple[list[list[float]], list[float]]:
    """Returns the steps of the axes of space and the centre of the first voxel, without `space directions`."""
    spacings = _per_axis(fields, ("spacings",), dimension, path)
    if spacings is None or not all(math.isfinite(spacings[axis]) for axis in spatial):
        raise InputError(
            "the header has neither 'space directions' nor 'spacings': the size of its voxels is not known",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    steps = [spacings[axis] for axis in spatial]
    notes.append("the header gives no directions: its axes are taken as those of its space")
    if min(steps) < 0:
        notes.append("the header's 'spacings' are negative: these axes are taken in reverse, as ITK takes them")
    origin = _origin(fields, dimension, spatial, steps, notes, path)
    scales = _units(fields, "units", tuple(spatial), notes, path, dimension)
    columns = [[steps[axis] * scales[axis] if row == axis else 0.0 for row in range(3)] for axis in range(3)]
    return columns, origin if "space origin" in fields else [a * b for a, b in zip(origin, scales, strict=True)]


def _origin(
    fields: dict[str, str], dimension: int, spatial: list[int], steps: list[float], notes: list[str], path: Path
) -> list[float]:
    """Returns the centre of the first voxel: `space origin`, or `axis mins` with the centring of every axis.

    `axis mins` is the centre of the first voxel on an axis of centring `node`, and its outer face on one of `cell`.
    ITK takes an axis of unknown centring as `cell`.
    """
    lowest = _per_axis(fields, ("axis mins", "axismins"), dimension, path)
    highest = _per_axis(fields, ("axis maxs", "axismaxs"), dimension, path)
    if "space origin" in fields:
        given = _space_origin(fields, path)
        if lowest is not None:
            raise damaged("it gives the first voxel twice, as 'space origin' and as 'axis mins'", path)
        return given
    if lowest is None or not all(math.isfinite(lowest[axis]) for axis in spatial):
        notes.append("the header gives no place of the first voxel; it is taken as the origin")
        return [0.0, 0.0, 0.0]
    words = fields.get("centerings", fields.get("centers", "")).lower().split()
    if words and len(words) != dimension:
        raise damaged(f"'centerings' has {len(words)} words for {dimension} axes", path)
    kinds = [words[axis] if words else "???" for axis in spatial]
    if not set(kinds) <= {"node", "cell", "???", "none"}:
        raise damaged(f"'centerings' are node or cell, here they are {' '.join(kinds)[:40]!r}", path)
    if not set(kinds) <= {"node", "cell"}:
        notes.append("the header's 'centerings' are not known: 'axis mins' is taken as an outer face, as ITK takes it")
    counts = [int(word) for word in fields["sizes"].split()]
    for axis, step, kind in zip(spatial, steps, kinds, strict=True):
        if highest is None or not math.isfinite(highest[axis]):
            continue
        spans = [step * (counts[axis] - 1)] if kind == "node" else [step * counts[axis]]
        spans += [step * (counts[axis] - 1)] if kind not in ("node", "cell") else []
        if not any(math.isclose(highest[axis] - lowest[axis], span, rel_tol=_AGREE) for span in spans):
            raise damaged("'axis mins' and 'axis maxs' contradict 'spacings' and 'sizes'", path)
    return [
        lowest[axis] + (0 if kind == "node" else step / 2)
        for axis, step, kind in zip(spatial, steps, kinds, strict=True)
    ]


def _space_origin(fields: dict[str, str], path: Path) -> list[float]:
    """Returns the three numbers of `space origin`; the fourth of a space with time is left out."""
    given = vectors(fields["space origin"]) or []
    if len(given) != 1 or given[0] is None or len(given[0]) not in (3, 4):
        raise damaged("'space origin' is no vector of three numbers", path)
    return given[0][:3]


def _per_axis(fields: dict[str, str], names: tuple[str, ...], dimension: int, path: Path) -> list[float] | None:
    """Returns the numbers of a field with one number per axis; None where there is no such field."""
    name = next((name for name in names if name in fields), None)
    return None if name is None else numbers(fields[name], dimension, name, path)


def _units(
    fields: dict[str, str], name: str, axes: tuple[int, ...], notes: list[str], path: Path, count: int | None = None
) -> list[float]:
    """Returns the units of three axes in mm. A note is added where one is not mm.

    Args:
        fields: The fields of the header.
        name: The field, a list of words in quotation marks.
        axes: The axes that are asked for.
        notes: Where notes are added.
        path: The file that errors name.
        count: Words that the field has; None where only the largest of `axes` limits it.

    Raises:
        InputError: The field is damaged.
    """
    if name not in fields:
        return [1.0] * len(axes)
    words = [unit.strip().lower() for unit in re.findall(r'"([^"]*)"', fields[name])]
    if len(words) <= max(axes) or count not in (None, len(words)) or re.sub(r'"[^"]*"', "", fields[name]).strip():
        raise damaged(f"{name!r} has one word in quotation marks per axis, here it is {fields[name][:60]!r}", path)
    units = [words[axis] for axis in axes]
    shown = ", ".join(sorted(set(units) - {""}))[:40]
    if not set(units) <= _MM.keys():
        notes.append(f"the header's units {shown!r} are not known; mm is assumed")
        return [1.0] * len(axes)
    scales = [_MM[unit] for unit in units]
    if any(scale != 1 for scale in scales):
        notes.append(f"the header's unit is {shown!r}; it is converted to mm, which ITK does not do")
    return scales
