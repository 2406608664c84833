"""Computes the affine of a NIfTI file from sform, qform, their codes and the unit. Source: nifti1.h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mome.errors import InputError

# The lower three bits of `xyzt_units`: code → (name, mm). 2 is mm; files without a unit (0) are in mm, too.
_UNITS = {1: ("metre", 1000.0), 3: ("micrometre", 0.001)}
# A quaternion's sum of squares exceeds 1 by rounding in float32 only.
_ROUNDING = 1e-4
# Voxel sizes in `pixdim` and in the sform agree to this share, apart from rounding (our choice).
_SIZES_AGREE = 0.02
# See `mome.volumes.check`.
_FLATTEST = 0.01
# Codes of transforms in nifti1.h.
_LARGEST_CODE = 5
# Programs that write a qform of rounded numbers leave some tenths of a mm at the far corner (our choice).
_DISAGREEMENT_MM = 0.5


@np.errstate(over="ignore", invalid="ignore")
def affine_of(
    transforms: Mapping[str, Any], shape: Sequence[int], where: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Returns the affine of a header's fields in mm, and notes on what was decided.

    The affine is the sform where its code is set and it can be inverted, else the qform, else, where both codes are
    0, the voxel sizes alone as nibabel and ANALYZE readers take them (axes to the left, anterior and superior).

    Args:
        transforms: `NiftiHeader.transforms`.
        shape: The three sizes of the volume.
        where: The file that errors name.

    Raises:
        InputError: There is no sform, and the qform is damaged.
    """
    notes: list[str] = []
    sform, qform = _sform(transforms), _qform(transforms)
    has_sform, has_qform = transforms["sform_code"] > 0, transforms["qform_code"] > 0
    scale, unit_notes = _unit(int(transforms["xyzt_units"]) & 7)
    if has_sform and _is_usable(sform):
        affine = sform
        if not has_qform:
            notes += _size_notes(transforms, sform)
        if has_qform and qform is None:
            notes.append("the header's qform is damaged; the sform is used")
        elif has_qform and qform is not None:
            apart = corner_distance(sform, qform, shape) * scale
            if apart > _DISAGREEMENT_MM:
                notes.append(f"sform and qform disagree by {apart:.3g} mm; the sform is used")
    elif has_sform and has_qform and qform is not None and _is_usable(qform):
        affine = qform
        notes.append("the header's sform cannot be inverted; the qform is used")
    elif has_sform:
        affine = sform
    elif has_qform and qform is None:
        raise InputError(
            "the header's qform is damaged and there is no sform: the file does not say where its voxels are",
            where=where,
            hint="convert the scan again from its DICOM series",
        )
    elif has_qform and qform is not None:
        affine = qform
    else:
        affine = _by_voxel_sizes(transforms, shape)
        notes.append("the header sets neither sform nor qform: directions are a guess, left and right may be exchanged")
    notes += _code_notes(transforms, has_qform)
    affine = affine.copy()
    affine[:3] *= scale
    return affine, notes + unit_notes


def _size_notes(transforms: Mapping[str, Any], sform: np.ndarray) -> list[str]:
    """Returns a note where the voxel sizes of `pixdim` are other ones than the sform's."""
    stored, used = np.asarray(transforms["pixdim"][1:4], dtype=float), np.linalg.norm(sform[:3, :3], axis=0)
    if np.allclose(stored, used, rtol=_SIZES_AGREE, atol=0):
        return []
    sizes = (" × ".join(f"{size:.4g}" for size in each) for each in (stored, used))
    return ["the header's pixdim gives voxels of {}, its sform of {}; the sform is used".format(*sizes)]


def _code_notes(transforms: Mapping[str, Any], has_qform: bool) -> list[str]:
    """Returns notes on codes that nifti1.h does not have, which the NIfTI library takes by their sign."""
    notes = []
    for name in ("sform_code", "qform_code"):
        code = transforms[name]
        if not 0 <= code <= _LARGEST_CODE:
            taken = "set" if code > 0 else "not set"
            notes.append(f"the header's {name} is {code}, which is not defined; it is taken as {taken}")
    handedness = float(transforms["pixdim"][0])
    if has_qform and handedness not in (-1, 0, 1):
        sign = -1 if handedness < 0 else 1
        notes.append(f"the header's qfac (pixdim[0]) is {handedness:g}, which is not defined; it is taken as {sign}")
    return notes


def corner_distance(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Returns the largest distance between corners of a volume under two affines, in their unit."""
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    corners[:, :3] *= np.asarray(shape[:3]) - 1
    return float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())


def _sform(transforms: Mapping[str, Any]) -> np.ndarray:
    rows = [transforms["srow_x"], transforms["srow_y"], transforms["srow_z"], (0.0, 0.0, 0.0, 1.0)]
    return np.array(rows, dtype=np.float64)


def _qform(transforms: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the affine of the quaternion; None where it is longer than 1, or a voxel size is not above 0."""
    b, c, d = (float(transforms[f"quatern_{name}"]) for name in "bcd")
    handedness, *sizes = (float(value) for value in transforms["pixdim"])
    squares = b * b + c * c + d * d
    if not squares <= 1 + _ROUNDING or not all(0 < size < np.inf for size in sizes):
        return None
    if squares > 1:
        b, c, d = (value / squares**0.5 for value in (b, c, d))
    a = max(0.0, 1 - squares) ** 0.5
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * (sizes[0], sizes[1], sizes[2] * (-1 if handedness < 0 else 1))
    affine[:3, 3] = [float(transforms[f"qoffset_{name}"]) for name in "xyz"]
    return affine


def _by_voxel_sizes(transforms: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """Returns the affine without directions: the volume's centre is the origin and the first axis runs to the left."""
    sizes = np.abs(np.asarray(transforms["pixdim"][1:4], dtype=np.float64)) * (-1, 1, 1)
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = -sizes * (np.asarray(shape[:3]) - 1) / 2
    return affine


def _is_usable(affine: np.ndarray) -> bool:
    """Says whether an affine is finite and can be inverted, whatever its unit is."""
    if not np.isfinite(affine).all():
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(norms.min() > 0 and abs(np.linalg.det(affine[:3, :3] / norms)) > _FLATTEST)


def _unit(code: int) -> tuple[float, list[str]]:
    """Returns the unit in mm, with a note where it is not mm."""
    if code in _UNITS:
        name, scale = _UNITS[code]
        return scale, [f"the header's unit is the {name}; it is converted to mm"]
    return 1.0, [f"the header's unit has the unknown code {code}; mm is assumed"] if code not in (0, 2) else []
