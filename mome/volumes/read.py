"""Reading a CT: NIfTI through nibabel, NRRD and MetaImage through SimpleITK, DICOM through pydicom."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.check import checked_volume
from mome.volumes.dicom.options import DEFAULT_DICOM, DicomOptions
from mome.volumes.grid import Volume
from mome.volumes.scan_files import DICOM_ENDINGS, ENDINGS_HINT, has_dicom_prefix, is_nifti, scan_ending


def read_volume(path: str | Path, *, frame: int | None = None, dicom: DicomOptions = DEFAULT_DICOM) -> Volume:
    """Reads a CT as float32 HU.

    The affine is the sform where its code is set, else the qform. A note says so where both are set and disagree,
    and where the sform is used because the qform is damaged. `mome.volumes.check` lists the other repairs and notes.

    Args:
        path: `.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`, a folder that holds a DICOM series, or a DICOM file
            of several frames.
        frame: The volume to take from a 4-D file, from 0. It may be left out where the file holds one volume; a 3-D
            file ignores it.
        dicom: Which DICOM series is read and what is accepted; see `DicomOptions`.

    Raises:
        InputError: The file is missing, of another format, truncated, 2-D or in colour; it holds several volumes and
            `frame` is None; its affine is damaged or cannot be inverted; or the package that reads it is not installed.
            `mome.volumes.dicom.read` lists what is refused of DICOM.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such file", where=str(path), hint="check the path")
    if is_nifti(path) and not path.is_dir():
        return _read_nifti(path, frame)
    if path.is_dir() or path.suffix.lower() in DICOM_ENDINGS or (scan_ending(path) is None and has_dicom_prefix(path)):
        from mome.volumes.dicom.read import read_dicom

        return read_dicom(path, dicom, frame=frame)
    if scan_ending(path) is None:
        raise InputError(
            f"cannot read {path.suffix or 'a file without an ending'}",
            where=str(path),
            hint=f"give {ENDINGS_HINT}, or a folder with a DICOM series",
        )
    return _read_itk(path)


def _read_nifti(path: Path, frame: int | None) -> Volume:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
            raise ImageFileError(type(image).__name__)
        if image.get_data_dtype().names is not None:
            raise InputError("this is a colour image, not a CT", where=str(path), hint="give a volume in HU")
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except InputError:
        raise
    except (ImageFileError, HeaderDataError) as error:
        raise InputError("not a NIfTI file", where=str(path), hint="is it named .nii by mistake?") from error
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if "w2 should be positive" in str(error):  # nibabel's message for a quaternion longer than 1
            raise InputError(
                "the header's qform is damaged and there is no sform: the file does not say where its voxels are",
                where=str(path),
                hint="convert the scan again from its DICOM series",
            ) from error
        raise InputError(
            "the file is truncated or damaged", where=str(path), hint="copy or download it again"
        ) from error
    notes: list[str] = []
    array = _three_dimensions(array, path, frame)
    header = image.header
    affine = np.asarray(image.affine, dtype=np.float64)
    if header["sform_code"] > 0 and header["qform_code"] > 0:
        try:
            apart = np.abs(header.get_sform() - header.get_qform()).max()
        except (ValueError, HeaderDataError):  # for a quaternion longer than 1 or a negative voxel size
            notes.append("the header's qform is damaged; the sform is used")
        else:
            if apart > 1e-2:
                notes.append(f"sform and qform disagree by {apart:.3g} mm; the sform is used")
    keep = {
        "sform_code": int(header["sform_code"]),
        "qform_code": int(header["qform_code"]),
        "xyzt_units": int(header["xyzt_units"]),
    }
    return checked_volume(Volume(array, affine, keep, tuple(notes)), str(path))


def _three_dimensions(array: np.ndarray, path: Path, frame: int | None) -> np.ndarray:
    while array.ndim > 4 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 4:
        count = array.shape[3]
        if frame is None and count > 1:
            raise InputError(
                f"the file holds {count} volumes",
                where=str(path),
                hint=f"choose one from 0 to {count - 1}: mome segment --frame 0, in Python frame=0",
            )
        chosen = frame or 0
        if not 0 <= chosen < count:
            raise InputError(
                f"frame {chosen} of {count} does not exist", where=str(path), hint=f"frames are 0 to {count - 1}"
            )
        array = array[..., chosen]
    if array.ndim != 3:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {tuple(array.shape)}",
            where=str(path),
            hint="give the whole stack of slices",
        )
    return array


def _read_itk(path: Path) -> Volume:
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise InputError(
            "NRRD and MetaImage are read through SimpleITK, which is not installed",
            where=str(path),
            hint='pip install "mome[dicom]", or convert the scan to .nii.gz',
        ) from error
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError("the file is truncated or damaged", where=str(path), hint="copy it again") from error
    if image.GetNumberOfComponentsPerPixel() != 1 or image.GetDimension() != 3:
        raise InputError("this is not a CT of three dimensions and one channel", where=str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS
    array = sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0)
    header = {"sform_code": 1, "qform_code": 1, "xyzt_units": 2}
    return checked_volume(Volume(array, affine, header), str(path))
