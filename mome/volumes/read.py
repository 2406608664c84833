"""Reading a CT: NIfTI, NRRD, MetaImage, and a DICOM series."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.check import checked_volume
from mome.volumes.grid import Volume
from mome.volumes.metaimage import read_metaimage
from mome.volumes.nifti import read_nifti
from mome.volumes.nrrd import read_nrrd
from mome.volumes.scan_files import APPLE_DOUBLE, ENDINGS_HINT, METAIMAGE_ENDINGS, NRRD_ENDINGS, scan_ending
from mome.volumes.stored import StoredVolume


def read_volume(path: str | Path, *, frame: int | None = None, any_values: bool = False) -> Volume:
    """Reads a CT as float32 HU.

    The affine of a NIfTI file is the sform where its code is set, else the qform. A note says so where both are set
    and disagree, where one is damaged, and where neither is set; metres and micrometres become mm.
    `mome.volumes.check` lists the other repairs and notes.

    Args:
        path: `.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`, or a folder that holds one DICOM series.
        frame: The volume to take from a 4-D file, from 0. It may be left out where the file holds one volume; a 3-D
            file ignores it.
        any_values: Give a note where the values cannot be HU, and no error; for showing what a file holds.

    Raises:
        InputError: The file is missing, not a regular file, of another format, truncated, 2-D or in colour; its
            compressed stream fails its checksum; it holds several volumes and `frame` is None; its affine is damaged
            or cannot be inverted; it names a data file outside its folder; it is too large (`mome.volumes.sizes`); or
            its values cannot be HU (`mome.volumes.hounsfield`).
    """
    path = Path(path)
    if path.is_dir():
        return checked_volume(_read_dicom_series(path), str(path), any_values=any_values)
    stored = read_stored(path, frame=frame)
    volume = Volume(stored.as_float32(), stored.affine, stored.header, stored.notes)
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
            hint=f"give {ENDINGS_HINT}, or a folder with one DICOM series",
        )


def _read_dicom_series(path: Path) -> Volume:
    """Reads a folder that holds one DICOM series."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise InputError(
            "DICOM is read through SimpleITK, which is not installed",
            where=str(path),
            hint='pip install "mome[dicom]", or convert the scan to .nii.gz',
        ) from error
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if len(series) != 1:
        raise InputError(
            f"the folder holds {len(series)} DICOM series, not one", where=str(path), hint="one series per folder"
        )
    try:
        image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0]))
    except RuntimeError as error:
        raise InputError("the file is truncated or damaged", where=str(path), hint="copy it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError("this is not a CT of three dimensions and one channel", where=str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS
    array = sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    return Volume(array, affine, {"sform_code": 1, "qform_code": 1, "xyzt_units": 2})
