"""Checks and repairs of a CT before it is used, whether it was read from a file or passed as an array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mome.errors import InputError
from mome.volumes.doubtful_air import doubtful_air
from mome.volumes.doubtful_axes import doubtful_axes
from mome.volumes.doubtful_front import doubtful_front
from mome.volumes.doubtful_planes import doubtful_planes
from mome.volumes.doubtful_regions import doubtful_regions
from mome.volumes.fast_gzip import deflate_library
from mome.volumes.grid import SMALLEST_SHEAR, Grid, Volume
from mome.volumes.hounsfield import doubt_about
from mome.volumes.sizes import check_size
from mome.volumes.value_sample import ValueSample
from mome.volumes.voxel_order import Differences, other_order

# The volume of three unit vectors along the axes: 1 where they are at right angles, 0 where they lie in a plane. A
# tilted gantry leaves more than 0.8.
_FLATTEST = 0.01
# Fields of view of clinical CT, and the pixels below which a volume is taken for a crop (our choice).
_SMALLEST_VIEW_MM, _LARGEST_VIEW_MM, _FEWEST_PIXELS = 50.0, 1000.0, 32
# Fewer voxels are no scan of a patient.
_FEWEST_VOXELS = 1_000
# Our choice: CT has slices of at most 10 mm, rarely more, and pixels of more than 0.1 mm.
_SMALLEST_VOXEL_MM, _LARGEST_VOXEL_MM = 0.1, 12.0


def checked_volume(volume: Volume, where: str | None = None, *, any_values: bool = False) -> Volume:
    """Returns the volume as finite float32 HU, with notes on repairs and on values that look wrong.

    NaN becomes air (−1024 HU); +Inf and −Inf become the largest and the smallest finite value. A note that the
    volume already has is not repeated, so checking twice gives the same as checking once. The second time is quick,
    where neither voxels nor affine have changed since (CRC-32).

    Args:
        volume: An array (i, j, k) of HU and its affine.
        where: The file that errors name.
        any_values: Give a note where the values cannot be HU, and no error.

    Raises:
        InputError: The array has not three dimensions, no voxel or no finite value; the affine cannot be inverted; the
            volume is too large (see `mome.volumes.sizes`); or its values cannot be HU (see `mome.volumes.hounsfield`).
    """
    if volume.checksum is not None and volume.checksum == _checksum(volume.array, volume.affine):
        return volume
    array, array_notes = _numbers(volume.array, where)
    affine = np.asarray(volume.affine, dtype=np.float64)
    check_grid(array.shape, affine, where)
    notes = [
        *volume.notes,
        *array_notes,
        *_voxel_notes(affine),
        *_default_notes(array.shape, affine),
        *_extent_notes(array.shape, affine),
    ]
    grid = Grid(array.shape, affine)
    spacing, shear = grid.spacing, grid.shear
    if shear > SMALLEST_SHEAR:
        notes.append(
            f"the axes are not at right angles (cosine {shear:.3f}: gantry tilt?); the affine is kept as it is"
        )
    array, values, repairs = _finite(array, where)
    notes += repairs
    differences, known = Differences(array), ValueSample(values)
    doubt = doubt_about(values, differences, known)
    if doubt is not None and doubt.is_hopeless and not any_values:
        raise InputError(
            f"these are not the values of a CT: {doubt.what}",
            where=where,
            hint="give the scan in HU (air −1000, water 0), as its DICOM series has it",
        )
    if doubt is not None:
        notes.append(doubt.what)
    else:  # drawn images have equal planes, and are doubted already
        in_planes = doubtful_planes(array, tuple(notes))
        if not in_planes and (order := other_order(differences)) is not None:
            in_planes = [order]
        notes += in_planes
        notes += doubtful_regions(array, spacing)
        notes += doubtful_air(array, known if values is array else None)
        if not in_planes:
            notes += doubtful_axes(array, affine) or doubtful_front(array, affine)
    # What is let pass with a note here is refused where values must be HU.
    checksum = _checksum(array, affine) if doubt is None or not doubt.is_hopeless else None
    return replace(volume, array=array, affine=affine, notes=tuple(dict.fromkeys(notes)), checksum=checksum)


def _checksum(array: object, affine: object) -> int | None:
    """Returns the CRC-32 of an array of float32 in C order, its shape and its affine; None for other arrays."""
    if not (isinstance(array, np.ndarray) and isinstance(affine, np.ndarray)):
        return None
    if array.dtype != np.float32 or not array.size or not array.flags.c_contiguous or np.ma.isMaskedArray(array):
        return None
    crc32 = deflate_library()[0].crc32  # all give the same number
    found: int = crc32(array.data.cast("B"), crc32(repr((array.shape, affine.tolist())).encode()))
    return found


def _numbers(given: object, where: str | None) -> tuple[np.ndarray, list[str]]:
    """Returns the voxels as an array of real numbers, and a note where masked voxels were filled with air.

    Raises:
        InputError: They are no real numbers.
    """
    notes = []
    if np.ma.isMaskedArray(given):
        masked = int(np.ma.getmaskarray(given).sum())
        notes = [f"{masked} voxels are masked and are read as air"] if masked else []
        given = np.ma.filled(given.astype(np.float32), -1024.0)
    array = np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"the voxels of a CT are real numbers, these are of type {array.dtype}",
            where=where,
            hint="give HU, as in array.astype('float32')",
        )
    return array, notes


def _finite(array: np.ndarray, where: str | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the voxels as finite float32 in C order, the values that were finite, and a note on the others.

    Padding with NaN says nothing about the other values, so it is not among the values.

    Raises:
        InputError: No value is finite.
    """
    with np.errstate(invalid="ignore"):
        ends = array.min(), array.max()  # NaN and infinity reach one of them
    if np.isfinite(ends).all():
        array = np.ascontiguousarray(array, dtype=np.float32)
        return array, array, []
    finite = np.isfinite(array)
    if not finite.any():
        raise InputError(
            "no voxel has a finite value", where=where, hint="convert the scan again from its DICOM series"
        )
    values = array[finite]
    array = np.nan_to_num(array, nan=-1024.0, posinf=float(values.max()), neginf=float(values.min()))
    notes = [f"{finite.size - values.size} voxels were NaN or infinite; NaN is read as air"]
    return np.ascontiguousarray(array, dtype=np.float32), values.astype(np.float32, copy=False), notes


@np.errstate(over="ignore", invalid="ignore")
def check_grid(shape: Sequence[int], affine: np.ndarray, where: str | None) -> None:
    """Checks the shape and the affine of a volume.

    Raises:
        InputError: There are not three dimensions or no voxel, the affine cannot be inverted, or the volume is too
            large or too small for a patient.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {tuple(shape)}",
            where=where,
            hint=_three_dimensions(shape),
        )
    if np.shape(affine) != (4, 4):
        what = "missing" if np.shape(affine) == () else f"of shape {np.shape(affine)}"
        raise InputError(
            f"the affine is {what}, not (4, 4)", where=where, hint="a matrix from voxels (i, j, k, 1) to mm in RAS"
        )
    if not _can_be_inverted(affine):
        raise InputError(
            "the affine cannot be inverted: it does not say where the voxels are",
            where=where,
            hint="convert the scan again from its DICOM series",
        )
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise InputError(
            f"the last row of the affine is {affine[3].tolist()}, not [0, 0, 0, 1]",
            where=where,
            hint="give an affine (4, 4) from voxels to mm in RAS; is it transposed?",
        )
    check_size(shape, affine=affine, where=where)


def _voxel_notes(affine: np.ndarray) -> list[str]:
    """Returns a note where voxels are larger or smaller than those of a CT of a patient."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if _SMALLEST_VOXEL_MM <= sizes.min() and sizes.max() <= _LARGEST_VOXEL_MM:
        return []
    shown = " × ".join(f"{size:.4g}" for size in sizes)
    unusual = f"voxels are {shown} mm large, which is unusual: is the header right?"
    if sizes.max() > _LARGEST_VOXEL_MM:
        return [f"{unusual} Models are trained on far smaller ones: masks may be wrong, and small structures missed"]
    return [f"{unusual} Small structures may be missed"]


def _default_notes(shape: tuple[int, ...], affine: np.ndarray) -> list[str]:
    """Returns a note where the affine is that of an image whose voxel size nobody gave.

    Software that makes an image from an array alone takes voxels of 1 mm and puts the first at 0: nibabel with
    `np.eye(4)`, and SimpleITK, whose axes have the other sign in RAS.
    """
    is_default = np.array_equal(np.abs(affine[:3, :3]), np.eye(3)) and not affine[:3, 3].any()
    if not is_default or math.prod(shape) < _FEWEST_VOXELS:
        return []
    return ["voxels are exactly 1 mm large and the first lies at 0, as where nobody gave the voxel size: is it right?"]


def _extent_notes(shape: tuple[int, ...], affine: np.ndarray) -> list[str]:
    """Returns a note where the field of view is not that of a CT of a patient.

    The second largest extent is judged: a scan may be long, as one of the whole body, or have a few slices only.
    """
    extents = np.linalg.norm(affine[:3, :3], axis=0) * shape
    second = float(np.sort(extents)[1])
    largest_sides = sorted(shape)[1:]
    if second > _LARGEST_VIEW_MM:
        return [f"the field of view is {second / 1000:.2g} m, more than that of a scanner: is the voxel size right?"]
    if second < _SMALLEST_VIEW_MM and largest_sides[0] >= _FEWEST_PIXELS:
        return [f"the field of view is {second / 10:.2g} cm: a specimen, an animal, or a crop?"]
    return []


def _three_dimensions(shape: Sequence[int]) -> str:
    """Returns what to do about an array of another number of dimensions."""
    if len(shape) == 4 and shape[0] == 1:
        return "array[0], without the axis of one channel"
    if len(shape) == 4 and shape[-1] == 1:
        return "array[..., 0], without the axis of one channel"
    return "give the whole stack of slices"


def _can_be_inverted(affine: np.ndarray) -> bool:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(lengths).all() or lengths.min() < 1e-9:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > _FLATTEST)
