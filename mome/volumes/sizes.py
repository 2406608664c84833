"""Estimates the size of a volume before anything is allocated. Every reader and the network grid call this function."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from mome.errors import InputError

# Our choice: a CT of 1024 × 1024 × 1900 voxels. In float32 this is 8 GB.
MOST_VOXELS = 2_000_000_000
# Our choice: scanners reach about 2 m; whole-body scans of less than 1 mm are files with wrong units.
LONGEST_MM, SHORTEST_MM = 4_000.0, 1.0
# Our choice: organs vanish in larger voxels.
LARGEST_VOXEL_MM = 100.0
# Our choice: the origin of coordinates is in the scanner's room or in an atlas.
FARTHEST_MM = 1_000_000.0
_BYTES_PER_VOXEL = 4  # float32


def check_size(
    shape: Sequence[float],
    *,
    affine: np.ndarray | None = None,
    what: str = "the scan",
    where: str | None = None,
    hint: str | None = None,
) -> None:
    """Checks that a volume can be held in memory, and that its extent is that of a patient.

    Args:
        shape: Voxels along every axis; more than three for a 4-D file. Floats are allowed, so that a huge number is
            refused and not converted.
        affine: (4, 4), from voxels to mm; None where it is not known yet.
        what: The volume in the error, as in "the network grid".
        where: The file that the error names.
        hint: What to do about too many voxels.

    Raises:
        InputError: The volume has more than `MOST_VOXELS` voxels or needs more memory than the machine has, or it is
            longer than `LONGEST_MM` or nowhere longer than `SHORTEST_MM`, has voxels longer than `LARGEST_VOXEL_MM`, or
            lies farther than `FARTHEST_MM` from the origin. The message gives the numbers.
    """
    voxels = math.prod(float(n) for n in shape)
    size = voxels * _BYTES_PER_VOXEL
    if not voxels <= MOST_VOXELS or size > machine_bytes():
        sides = " × ".join(f"{float(n):,.0f}" for n in shape)
        raise InputError(
            f"{what} has {sides} voxels, {size / 1e9:,.3g} GB in memory; the limit is "
            f"{min(MOST_VOXELS * _BYTES_PER_VOXEL, machine_bytes()) / 1e9:,.3g} GB",
            where=where,
            hint=hint or "crop or resample the scan; is its header right?",
        )
    if affine is None:
        return
    affine = np.asarray(affine, dtype=np.float64)
    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    lengths = voxel * np.asarray(shape[:3], dtype=float)
    if not lengths.max() <= LONGEST_MM or lengths.max() < SHORTEST_MM:
        sides = " × ".join(f"{length:,.4g}" for length in lengths)
        limit = f"at most {LONGEST_MM:,.0f}" if lengths.max() >= SHORTEST_MM else f"more than {SHORTEST_MM:g}"
        raise InputError(
            f"{what} is {sides} mm large, which no patient is; the longest side is {limit} mm",
            where=where,
            hint="are the units or the voxel sizes in its header right?",
        )
    if voxel.max() > LARGEST_VOXEL_MM:
        raise InputError(
            f"{what} is {' × '.join(f'{length:,.4g}' for length in lengths)} mm large, with voxels of "
            f"{' × '.join(f'{length:,.4g}' for length in voxel)} mm; the limit is {LARGEST_VOXEL_MM:g} mm",
            where=where,
            hint="are the units or the voxel sizes in its header right?",
        )
    distance = float(np.linalg.norm(affine[:3, 3]))
    if not distance <= FARTHEST_MM:
        raise InputError(
            f"{what} lies {distance:,.4g} mm from the origin of its coordinates; the limit is {FARTHEST_MM:,.0f} mm",
            where=where,
            hint="is the origin in its header right?",
        )


def machine_bytes() -> float:
    """Returns the memory of the machine in bytes; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
