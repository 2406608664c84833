"""The one reader of label maps: files of whole numbers that stand for structures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.check import check_grid
from mome.volumes.grid import Volume
from mome.volumes.read import read_stored
from mome.volumes.stored import SeveralVolumes, StoredVolume

# A map that was written with a slope holds 5.00005 for 5. A value that is further off is no label.
TOLERANCE = 1e-3


def read_label_map(path: str | Path) -> Volume:
    """Reads a label map or a mask as whole numbers on its grid.

    Returns:
        A volume whose array (i, j, k) is uint8, uint16 or int32, the smallest that holds its values.

    Raises:
        InputError: The file cannot be read (see `mome.volumes.read.read_volume`), it holds several volumes, or a value
            is not within `TOLERANCE` of a whole number.
    """
    try:
        stored = read_stored(path)
    except SeveralVolumes as error:
        raise InputError(
            f"{error.what}, and a label map is one volume of three dimensions",
            where=str(path),
            hint="save one of them, as in nibabel: nib.save(nib.load('mask.nii.gz').slicer[..., 0], 'mask_3d.nii.gz')",
        ) from error
    check_grid(stored.array.shape, stored.affine, str(path))
    return Volume(_whole_numbers(stored, str(path)), stored.affine, stored.header, stored.notes)


def unnamed_values(array: np.ndarray, named: Iterable[int]) -> list[int]:
    """Returns the values of a label map, other than 0, that no name stands for, in ascending order.

    Args:
        array: (i, j, k) of whole numbers.
        named: The values that have names.
    """
    known = {0, *named}
    values: set[int] = set()
    for plane in array:  # plane by plane, because `unique` makes a sorted copy
        values.update(np.unique(plane).tolist())
    return sorted(values - known)


def listed_values(values: list[int], most: int = 5) -> str:
    """Returns values as text for a message, at most `most` of them."""
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def _whole_numbers(stored: StoredVolume, where: str) -> np.ndarray:
    """Returns the values as whole numbers in the smallest type that holds them."""
    array = stored.array
    if array.dtype.kind in "iu" and not stored.is_scaled:
        return np.ascontiguousarray(array, dtype=_smallest(int(array.min()), int(array.max()), where))
    low, high = np.inf, -np.inf

    def rounded(block: np.ndarray, start: int) -> np.ndarray:
        nonlocal low, high
        whole = np.rint(block)
        wrong = ~(np.abs(block - whole) <= TOLERANCE)  # NaN and infinity are wrong, too
        if wrong.any():
            i, j, plane = (int(n) for n in np.argwhere(wrong)[0])
            place = (i, j, plane + start)
            raise InputError(
                f"a label map holds whole numbers, this one holds {block[i, j, plane]:.6g} at voxel {place}",
                where=where,
                hint="was it resampled linearly? Use nearest neighbour",
            )
        low, high = min(low, float(whole.min())), max(high, float(whole.max()))
        _smallest(low, high, where)
        return whole

    whole = stored.converted(np.int32, rounded)
    return whole.astype(_smallest(low, high, where), copy=False)


def _smallest(low: float, high: float, where: str) -> np.dtype:
    """Returns the smallest type that holds values from `low` to `high`.

    Raises:
        InputError: Values are outside int32.
    """
    for kind in (np.uint8, np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise InputError(
        f"a label map holds small whole numbers, this one holds {low:.6g} to {high:.6g}",
        where=where,
        hint="is it a label map?",
    )


def read_mask(path: str | Path, *, hint: str = "write the structure as 1 and everything else as 0") -> Volume:
    """Reads a file of 0 and one other number as a mask.

    Args:
        path: The file.
        hint: What to do about a file with several numbers.

    Returns:
        A volume whose array (i, j, k) is bool.

    Raises:
        InputError: It contains several numbers or a negative one, or cannot be read.
    """
    volume = read_label_map(path)
    if volume.array.min() < 0:
        raise InputError(
            f"a mask holds no negative values, this file holds {volume.array.min()}",
            where=str(path),
            hint="write the structure as 1 and everything else as 0",
        )
    if several_numbers(volume.array):
        raise InputError(
            "a mask holds 0 and one other number, this file holds several: it is a map without a label table",
            where=str(path),
            hint=hint,
        )
    return Volume(volume.array > 0, volume.affine, volume.header)


def several_numbers(array: np.ndarray) -> bool:
    """Says whether an array contains several different numbers above 0."""
    inside = array[array > 0]
    return bool(inside.size and inside.min() != inside.max())
