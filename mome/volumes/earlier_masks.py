"""Masks that lie in a folder already: on which grid they lie, and of which scan they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from mome.errors import InputError
from mome.volumes.grid import Grid
from mome.volumes.mask_file import read_scan_digest
from mome.volumes.nifti import nifti_geometry
from mome.volumes.scan_files import is_nifti


def refuse_masks_on_other_grids(paths: Iterable[Path], grid: Grid) -> None:
    """Checks that no NIfTI file which would be replaced lies on another grid than that of the scan.

    Only headers are read. Files that cannot be read, such as masks that a killed program left, may be replaced.

    Args:
        paths: The files that will be written.
        grid: The grid of the scan.

    Raises:
        InputError: One does: it is a mask of another scan, or no mask.
    """
    for path in paths:
        if not is_nifti(path) or not path.is_file():
            continue
        try:
            shape, affine = nifti_geometry(path)
        except (InputError, OSError, EOFError, ValueError, zlib.error):
            continue
        there = Grid(shape, affine)  # type: ignore[arg-type]
        if not grid.same_as(there, tolerance=0.01):
            difference = grid.difference(there) if len(shape) == 3 else f"{len(shape)} axes"
            raise InputError(
                f"the file is there already, and lies on another grid than this scan: {difference}",
                where=str(path),
                hint="another folder or name, or overwrite=True",
            )


def scan_of_mask(path: Path) -> str:
    """Returns the digest of the scan that a NIfTI mask is of; empty where its header does not say, or is damaged."""
    try:
        return read_scan_digest(path)
    except (InputError, OSError, EOFError, ValueError, zlib.error):
        return ""
