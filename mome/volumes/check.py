"""Checks and repairs of a CT before it is used, whether it was read from a file or passed as an array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mome.errors import InputError
from mome.volumes.grid import Volume


def checked_volume(volume: Volume, where: str | None = None) -> Volume:
    """Returns the volume as finite float32 HU, with notes on repairs and on values that look wrong.

    NaN becomes air (−1024 HU); +Inf and −Inf become the largest and the smallest finite value. A note that the
    volume already has is not repeated, so checking twice gives the same as checking once.

    Args:
        volume: An array (i, j, k) of HU and its affine.
        where: The file that errors name.

    Raises:
        InputError: The array has not three dimensions or no voxel, or the affine cannot be inverted.
    """
    array, affine = np.asarray(volume.array), np.asarray(volume.affine, dtype=np.float64)
    if array.ndim != 3 or min(array.shape) < 1:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {tuple(array.shape)}",
            where=where,
            hint="give the whole stack of slices",
        )
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(
            "the affine cannot be inverted: it does not say where the voxels are",
            where=where,
            hint="convert the scan again from its DICOM series",
        )
    notes = list(volume.notes)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear = np.abs(directions.T @ directions - np.eye(3)).max()
    if shear > 1e-3:
        notes.append(
            f"the axes are not at right angles (cosine {shear:.3f}: gantry tilt?); the affine is kept as it is"
        )
    finite = np.isfinite(array)
    if not finite.all():
        values = array[finite]
        low, high = (float(values.min()), float(values.max())) if values.size else (-1024.0, -1024.0)
        array = np.nan_to_num(array, nan=-1024.0, posinf=high, neginf=low)
        notes.append(f"{int((~finite).sum())} voxels were NaN or infinite; NaN is read as air")
    if array.min() >= 0:
        if array.max() <= 1.0:
            notes.append("values lie in [0, 1]: this looks normalised, not HU")
        elif array.max() > 900:
            notes.append("no value is below 0: HU may be stored with an offset of 1024 that the file does not give")
    return replace(
        volume,
        array=np.ascontiguousarray(array, dtype=np.float32),
        affine=affine,
        notes=tuple(dict.fromkeys(notes)),
    )
