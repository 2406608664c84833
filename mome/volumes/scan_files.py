"""File endings of scans: which files are scans, which library reads them, and their names without the ending."""

from __future__ import annotations

from pathlib import Path

NIFTI_ENDINGS = (".nii.gz", ".nii")
# NRRD and MetaImage, which SimpleITK reads. `.nhdr` and `.mhd` are headers whose voxels lie in another file.
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
# Endings of DICOM files; many have none. A file is one slice, or a whole scan where it has several frames.
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
ENDINGS_HINT = ".nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd"


def scan_ending(path: str | Path) -> str | None:
    """Returns the ending, in lower case, of a file that is a scan by its name, else None."""
    name = Path(path).name.lower()
    return next((ending for ending in (*NIFTI_ENDINGS, *ITK_ENDINGS) if name.endswith(ending)), None)


def is_nifti(path: str | Path) -> bool:
    """Says whether a file is NIfTI by its name."""
    return scan_ending(path) in NIFTI_ENDINGS


def has_dicom_prefix(path: str | Path) -> bool:
    """Says whether a regular file has the letters DICM after its first 128 bytes, as DICOM files have."""
    path = Path(path)
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_dicom_folder(path: str | Path) -> bool:
    """Says whether a folder holds DICOM files, by their endings or their content."""
    path = Path(path)
    try:
        return path.is_dir() and any(
            entry.is_file() and (entry.suffix.lower() in DICOM_ENDINGS or has_dicom_prefix(entry))
            for entry in path.iterdir()
            if not entry.name.startswith(".") and scan_ending(entry) is None
        )
    except OSError:
        return False


def stem(path: str | Path) -> str:
    """Returns the name of a scan: a folder's whole name, or a file's name without its ending.

    The name of a DICOM folder often is a UID, whose digits after the last dot are no ending; nor are they in a file's
    name. `.` and `..` are the folders they stand for.
    """
    path = Path(path)
    if path.is_dir():
        return path.resolve().name if path.name in ("", "..") else path.name
    ending = scan_ending(path)
    if ending is not None:
        return path.name[: -len(ending)]
    return path.name if path.suffix[1:].isdigit() else path.stem
