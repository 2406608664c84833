"""Reading a CT: NIfTI, NRRD and MetaImage by readers of this package, DICOM through pydicom."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.git_lfs import refuse_pointer
from mome.volumes.check import checked_volume
from mome.volumes.dicom.options import DEFAULT_DICOM, DicomOptions
from mome.volumes.grid import Volume
from mome.volumes.metaimage import read_metaimage
from mome.volumes.nifti import read_nifti
from mome.volumes.not_ct import refuse_not_ct
from mome.volumes.nrrd import read_nrrd
from mome.volumes.other_files import check_no_other_kind
from mome.volumes.scan_files import (
    APPLE_DOUBLE,
    DICOM_ENDINGS,
    ENDINGS_HINT,
    METAIMAGE_ENDINGS,
    NRRD_ENDINGS,
    has_dicom_prefix,
    scan_ending,
)
from mome.volumes.stored import StoredVolume


def read_volume(
    path: str | Path,
    *,
    frame: int | None = None,
    dicom: DicomOptions = DEFAULT_DICOM,
    any_values: bool = False,
) -> Volume:
    """Reads a CT as float32 HU.

    The affine of a NIfTI file is the sform where its code is set, else the qform. A note says so where both are set
    and disagree, where one is damaged, and where neither is set; metres and micrometres become mm.
    `mome.volumes.check` lists the other repairs and notes.

    Args:
        path: `.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`, a folder that holds a DICOM series, or a DICOM file
            of several frames.
        frame: The volume to take from a 4-D file, from 0. It may be left out where the file holds one volume; a 3-D
            file ignores it.
        dicom: Which DICOM series is read and what is accepted; see `DicomOptions`.
        any_values: Give a note where the file is no CT or its values cannot be HU, and no error; for showing what a
            file holds.

    Raises:
        InputError: The file is missing, not a regular file, of another format, truncated, 2-D or in colour; its
            compressed stream fails its checksum; it holds several volumes and `frame` is None; its affine is damaged
            or cannot be inverted; it names a data file outside its folder; it is an archive, a pointer of Git LFS or a
            web page (`mome.volumes.other_files`); a DICOM series is asked for and it is not DICOM; it is too large
            (`mome.volumes.sizes`); its header says that it is no CT (`mome.volumes.not_ct`); or its values cannot be HU
            (`mome.volumes.hounsfield`). `mome.volumes.dicom.read` lists what is refused of DICOM.
    """
    path = Path(path)
    check_no_other_kind(path)
    is_dicom = path.suffix.lower() in DICOM_ENDINGS or (scan_ending(path) is None and has_dicom_prefix(path))
    if path.is_dir() or (is_dicom and path.is_file()):
        from mome.volumes.dicom.read import read_dicom

        return read_dicom(path, dicom, frame=frame)
    if dicom.series is not None:
        _check_readable(path)
        raise InputError(
            f"there is no series {str(dicom.series)[:64]!r}: the file holds one scan and is not DICOM",
            where=str(path),
            hint="leave out --series (in Python DicomOptions.series)",
        )
    stored = read_stored(path, frame=frame)
    notes = stored.notes
    if stored.not_ct is not None:
        if not any_values:
            raise refuse_not_ct(stored.not_ct, str(path))
        notes = (*notes, f"this is not a CT but {stored.not_ct}")
    volume = Volume(stored.as_float32(), stored.affine, stored.header, notes)
    return checked_volume(volume, str(path), any_values=any_values)


def read_stored(path: str | Path, *, frame: int | None = None) -> StoredVolume:
    """Reads a file as it stores its voxels, without a check of its values and its affine.

    Args:
        path: A file; see `read_volume`.
        frame: See `read_volume`.

    Raises:
        InputError: As for `read_volume`.
    """
    path = Path(path)
    _check_readable(path)
    ending = scan_ending(path)
    reader = read_nrrd if ending in NRRD_ENDINGS else read_metaimage if ending in METAIMAGE_ENDINGS else read_nifti
    try:
        # Damaged headers hold numbers that overflow; the checks of the result say so, numpy need not.
        with np.errstate(over="ignore", invalid="ignore"):
            return reader(path, frame)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError("the memory is not enough for this scan", where=str(path)) from error
    except (EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the file is truncated or damaged: {reason}", where=str(path), hint="copy or download it again"
        ) from error


def _check_readable(path: Path) -> None:
    """Checks that a path is a file with the ending of a scan.

    Raises:
        InputError: It is not, or there is no such file.
    """
    if not path.exists():
        if os.path.islink(path):
            raise InputError(
                "this symbolic link leads to no file", where=str(path), hint="give the file that it should lead to"
            )
        raise InputError("no such file", where=str(path), hint="check the path")
    if path.name.startswith(APPLE_DOUBLE):
        raise InputError(
            "this is a file of macOS's attributes, not the scan",
            where=str(path),
            hint=f"give {path.name[len(APPLE_DOUBLE) :]}",
        )
    if scan_ending(path) is None or path.is_dir():
        raise InputError(
            f"cannot read {'a folder here' if path.is_dir() else path.suffix or 'a file without an ending'}",
            where=str(path),
            hint=f"give {ENDINGS_HINT}, or a folder with a DICOM series",
        )
    if path.is_file() and not path.stat().st_size:
        raise InputError("the file is empty, it has 0 bytes", where=str(path), hint="copy or download it again")
    refuse_pointer(path)
