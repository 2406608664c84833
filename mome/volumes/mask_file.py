"""NIfTI files of masks, with their label table in the header."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.atomic import atomic_write
from mome.errors import InputError
from mome.volumes.boxed import BoxedArray
from mome.volumes.fast_gzip import GzipWriter
from mome.volumes.grid import Grid
from mome.volumes.nifti import nifti_extensions
from mome.volumes.nifti_transforms import affine_of, corner_distance

# The NIfTI header extension of code 6 is a plain comment, which every reader may show or skip.
_COMMENT = 6
_SCAN = "mome_scan"
# A qform holds no shear. One that moves no corner by this much, in mm, is rounding (our choice).
_SMALLEST_SHEAR_MM = 0.08


def write_mask(
    path: str | Path,
    array: np.ndarray | BoxedArray,
    grid: Grid,
    header: dict[str, Any] | None = None,
    labels: Sequence[dict[str, Any]] = (),
    *,
    scan: str = "",
    slope: float = 1.0,
    description: str = "",
) -> Path:
    """Writes a mask, a map of ids or a map of probabilities as NIfTI under a temporary name, then moves it.

    Args:
        path: A `.nii.gz` or `.nii` file; missing folders are made.
        array: (i, j, k) of integers, stored as uint8, or as uint16 where a value is above 255. Of an array that is zero
            outside of a box, only some planes are in memory at once.
        grid: The scan's grid.
        header: `Volume.header` of the scan. If the scan is NIfTI, the mask gets its sform, its qform, both codes and
            its unit as they are, so that every program sees mask and scan in the same place. Otherwise both
            transforms are made of the grid's affine; of a sheared one, the sform alone.
        labels: Entries `{"id", "name", …}`, stored as JSON in the file's header.
        scan: `mome.volumes.scan_digest.scan_digest` of the scan, stored beside the labels.
        slope: What readers multiply the stored numbers by, `scl_slope` of the header.
        description: What the file holds, at most 79 characters.

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
    boxed = array if isinstance(array, BoxedArray) else BoxedArray.whole(np.asarray(array))
    kind: type = np.uint16 if boxed.values.size and boxed.values.max() > 255 else np.uint8
    kept = _transforms_of(header, grid)
    # With an affine, nibabel would replace transforms that differ from it.
    empty: np.ndarray = np.broadcast_to(np.zeros((), dtype=kind), array.shape)  # for the header; it takes no memory
    image = nib.Nifti1Image(empty, grid.affine if kept is None else None)
    if kept is None:
        sform, qform = header.get("sform_code", 1), header.get("qform_code", 1)
        if _is_sheared(grid):  # programs that prefer the qform would see the mask elsewhere
            sform, qform = sform or 1, 0
        image.set_sform(grid.affine, code=sform if sform or qform else 1)
        image.set_qform(grid.affine, code=qform)
        image.header["xyzt_units"] = header.get("xyzt_units", 2) or 2
    else:
        for name, value in kept.items():
            if name == "pixdim":
                image.header["pixdim"][:4] = value
            else:
                image.header[name] = value
    if labels:
        table = json.dumps({"mome_labels": list(labels), **({_SCAN: scan} if scan else {})}).encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension(_COMMENT, table))
    if description:
        image.header["descrip"] = description.encode("ascii", "replace")[:79]
    with atomic_write(path, "the mask") as temporary:
        _write(temporary, _header_bytes(image, slope), boxed, kind)
    return path


def _header_bytes(image: Any, slope: float) -> bytes:
    """Returns everything that nibabel writes before the voxels of an image, with the scaling in its header."""
    image.update_header()
    header, buffer = image.header.copy(), io.BytesIO()
    header.set_slope_inter(slope, 0)
    header.write_to(buffer)
    start = buffer.getvalue()
    return start + bytes(int(header.get_data_offset()) - len(start))


def _write(path: Path, header: bytes, array: BoxedArray, kind: type) -> None:
    """Writes header and voxels, compressed where the name ends in `.gz`; planes of zeros are compressed once."""
    bytes_per_plane = array.shape[0] * array.shape[1] * np.dtype(kind).itemsize
    compress = path.name.lower().endswith(".gz")
    with path.open("wb") as file:
        out = GzipWriter(file) if compress else None
        put = file.write if out is None else out.write
        put(header)
        for planes, slab in array.slabs(kind):
            if slab is not None:
                put(slab.ravel(order="F").view(np.uint8).data)
            elif out is not None:
                out.write_zeros(planes * bytes_per_plane)
            else:
                for _ in range(planes):
                    put(bytes(bytes_per_plane))
        if out is not None:
            out.close()


def read_label_table(path: str | Path) -> list[dict[str, Any]]:
    """Returns the label table in the header of a NIfTI file; an empty list where there is none.

    Returns:
        Entries with an `id`, a whole number, a `name`, and whatever else they hold.

    Raises:
        InputError: The file cannot be read, or its table is damaged.
    """
    path = Path(path)
    try:
        extensions = nifti_extensions(path)
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError("the file is truncated or damaged", where=str(path), hint="copy it again") from error
    for code, content in extensions:
        if code == _COMMENT and b"mome_labels" in content:
            return _table(content, path)
    return []


def read_scan_digest(path: str | Path) -> str:
    """Returns the digest of the scan that a mask is of; empty where the header does not hold it.

    Raises:
        InputError, OSError, EOFError, ValueError, zlib.error: The file cannot be read, or the comment is damaged.
    """
    for code, content in nifti_extensions(Path(path)):
        if code == _COMMENT and b"mome_labels" in content:
            found = json.loads(content.rstrip(b"\0"))
            digest = found.get(_SCAN) if isinstance(found, dict) else None
            return digest if isinstance(digest, str) else ""
    return ""


def _table(content: bytes, path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a label table in JSON.

    Raises:
        InputError: It is no JSON, or of another shape.
    """
    try:
        table = json.loads(content.rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise _damaged_table(path) from error
    if not isinstance(table, dict) or "mome_labels" not in table:
        return []  # a comment of another program that contains the words
    entries = table["mome_labels"]
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise _damaged_table(path)
    return entries


def _is_entry(entry: Any) -> bool:
    number = entry.get("id") if isinstance(entry, dict) else None
    return isinstance(number, int) and not isinstance(number, bool) and isinstance(entry.get("name"), str)


def _damaged_table(path: Path) -> InputError:
    return InputError(
        "the label table in the header is damaged", where=str(path), hint="write the masks again with mome segment"
    )


def _is_sheared(grid: Grid) -> bool:
    """Says whether the axes of a grid are so far from right angles that no qform holds them."""
    upright = grid.affine.copy()
    left, _, right = np.linalg.svd(grid.affine[:3, :3] / grid.spacing)
    upright[:3, :3] = left @ right * grid.spacing  # the closest directions at right angles
    return corner_distance(grid.affine, upright, grid.shape) > _SMALLEST_SHEAR_MM


def _transforms_of(header: Mapping[str, Any], grid: Grid) -> dict[str, Any] | None:
    """Returns the transforms of the scan's NIfTI header; None where it has none, or `grid` is not the scan's."""
    kept = header.get("transforms")
    if kept is None:
        return None
    try:
        affine, _ = affine_of(kept, grid.shape)
    except InputError:
        return None
    same = np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 0 and grid.same_as(Grid(grid.shape, affine))
    return dict(kept) if same else None
