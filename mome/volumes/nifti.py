"""Reads the voxels of a NIfTI file. The whole file is read, so that a damaged gzip stream fails its checksum."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np

from mome.errors import InputError
from mome.volumes.nifti_header import read_extensions, read_nifti_header
from mome.volumes.nifti_transforms import affine_of
from mome.volumes.open_file import open_regular
from mome.volumes.stored import StoredVolume, three_dimensions
from mome.volumes.streams import (
    GZIP_MAGIC,
    Readable,
    count_rest,
    decompressed,
    most_bytes,
    read_exactly,
    skip,
)

# More bytes than these after the voxels mean that the header's sizes are wrong.
_MOST_TRAILING_BYTES = 1 << 26


def read_nifti(path: Path, frame: int | None = None) -> StoredVolume:
    """Reads a NIfTI file; whether it is compressed is decided by its content.

    Args:
        path: The file.
        frame: The volume to take from a 4-D file; see `mome.volumes.read.read_volume`.

    Raises:
        InputError: See `read_nifti_header`; or the file is shorter than its header says.
        EOFError, OSError, zlib.error: The compressed stream is damaged or fails its checksum.
    """
    with open_regular(path) as file:
        stream, encoding = _content(file)
        header = read_nifti_header(stream, path)
        size = path.stat().st_size
        if header.offset + header.voxel_bytes > most_bytes(size, encoding):
            raise InputError(
                f"the file is truncated or damaged: its header names {header.voxel_bytes:,} bytes of voxels, "
                f"its {size:,} bytes cannot hold them",
                where=str(path),
                hint="copy or download it again",
            )
        skip(stream, header.offset - header.size)
        stored = read_exactly(stream, header.voxel_bytes)
        rest = count_rest(stream, _MOST_TRAILING_BYTES)
    if rest > _MOST_TRAILING_BYTES:
        raise InputError(
            f"the file holds far more than the {header.voxel_bytes:,} bytes of voxels that its header names",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    array = stored.view(header.dtype).reshape(header.shape, order="F")
    array = three_dimensions(array, path, frame)
    affine, notes = affine_of(header.transforms, array.shape, str(path))
    if rest:
        notes.append(f"{rest:,} bytes after the voxels are not read")
    kept = {name: header.transforms[name] for name in ("sform_code", "qform_code", "xyzt_units")}
    kept["transforms"] = header.transforms
    all_notes = (*header.notes, *notes)
    return StoredVolume(array, affine, header.slope, header.intercept, kept, all_notes, header.not_ct)


def nifti_extensions(path: Path) -> list[tuple[int, bytes]]:
    """Returns the extensions of a NIfTI file's header as (code, content); no voxel is read.

    Raises:
        InputError: As for `read_nifti_header`; the file does not say where its voxels are; or an extension is damaged.
        EOFError, OSError, zlib.error: The compressed stream is damaged.
    """
    with open_regular(path) as file:
        stream, _ = _content(file)
        header = read_nifti_header(stream, path)
        affine_of(header.transforms, (*header.shape, 1, 1)[:3], str(path))
        return read_extensions(stream, header, path)


def nifti_geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the shape of a NIfTI file and its affine (4, 4) in mm; no voxel is read.

    Raises:
        InputError: As for `read_nifti_header`, or the file does not say where its voxels are.
        EOFError, OSError, zlib.error: The compressed stream is damaged.
    """
    with open_regular(path) as file:
        header = read_nifti_header(_content(file)[0], path)
    return header.shape, affine_of(header.transforms, (*header.shape, 1, 1)[:3], str(path))[0]


def _content(file: BinaryIO) -> tuple[Readable, str]:
    """Returns the stream of a file's content, and how it is encoded."""
    magic = file.read(2)
    file.seek(0)
    encoding = "zlib" if magic == GZIP_MAGIC else "raw"
    return decompressed(file, encoding), encoding
