"""NIfTI files of masks, with their label table in the header."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.volumes.grid import Grid

# The NIfTI header extension of code 6 is a plain comment, which every reader may show or skip.
_COMMENT = 6


def write_mask(
    path: str | Path,
    array: np.ndarray,
    grid: Grid,
    header: dict[str, Any] | None = None,
    labels: Sequence[dict[str, Any]] = (),
) -> Path:
    """Writes a mask or a map of ids as NIfTI under a temporary name, then moves it.

    Args:
        path: A `.nii.gz` or `.nii` file; missing folders are made.
        array: (i, j, k) of integers, stored as uint8, or as uint16 where a value is above 255.
        grid: The scan's grid.
        header: `Volume.header` of the scan; its sform and qform codes and its units are kept.
        labels: Entries `{"id", "name", …}`, stored as JSON in the file's header.

    Returns:
        `path`.

    Raises:
        OutputError: The file cannot be written; nothing is left behind.
        ValueError: The array does not have the grid's shape.
    """
    import nibabel as nib

    path, header = Path(path), header or {}
    if tuple(array.shape) != tuple(grid.shape):
        raise ValueError(f"mask of shape {array.shape} for a grid of shape {grid.shape}")
    kind = np.uint16 if array.size and array.max() > 255 else np.uint8
    image = nib.Nifti1Image(np.asarray(array, dtype=kind), grid.affine)
    sform, qform = header.get("sform_code", 1), header.get("qform_code", 1)
    image.set_sform(grid.affine, code=sform if sform or qform else 1)
    image.set_qform(grid.affine, code=qform)
    image.header["xyzt_units"] = header.get("xyzt_units", 2) or 2
    if labels:
        table = json.dumps({"mome_labels": list(labels)}).encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension(_COMMENT, table))
    with atomic_write(path, "the mask") as temporary:
        nib.save(image, temporary)
    return path


def read_label_table(path: str | Path) -> list[dict[str, Any]]:
    """Returns the label table in the header of a NIfTI file; an empty list where there is none.

    Raises:
        InputError: The file cannot be read.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nib.load(path)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise InputError("not a NIfTI file", where=str(path)) from error
    for extension in getattr(image.header, "extensions", []):
        if extension.get_code() != _COMMENT:
            continue
        content = extension.get_content()
        text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
        try:
            table = json.loads(text.rstrip("\0"))
        except json.JSONDecodeError:
            continue
        if isinstance(table, dict) and "mome_labels" in table:
            return table["mome_labels"]
    return []
