"""Which files are scans, which library reads them, and their names without the ending. Every command asks here."""

from __future__ import annotations

from pathlib import Path

from mome.errors import InputError

NIFTI_ENDINGS = (".nii.gz", ".nii")
# NRRD and MetaImage. `.nhdr` and `.mhd` are headers whose voxels lie in another file.
NRRD_ENDINGS = (".nrrd", ".nhdr")
METAIMAGE_ENDINGS = (".mha", ".mhd")
# Endings of DICOM files; many have none. A file is one slice, or a whole scan where it has several frames.
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
# Names, in lower case, of files that DICOM media and operating systems put beside the images.
MEDIA_FILES = ("dicomdir", "thumbs.db", "desktop.ini", "lockfile", "version")
ENDINGS_HINT = ".nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd"
# macOS stores the attributes of `ct.nii.gz` in a file of this prefix on disks that have no place for them.
APPLE_DOUBLE = "._"


def scan_ending(path: str | Path) -> str | None:
    """Returns the ending, in lower case, of a file that is a scan by its name, else None.

    macOS's attribute files (`._ct.nii.gz`) are no scans.
    """
    name = Path(path).name.lower()
    if name.startswith(APPLE_DOUBLE):
        return None
    endings = (*NIFTI_ENDINGS, *NRRD_ENDINGS, *METAIMAGE_ENDINGS)
    return next((ending for ending in endings if name.endswith(ending)), None)


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


def scans_in(folder: str | Path) -> list[Path]:
    """Returns the entries of a folder that are scans by their names, sorted. Hidden files are left out.

    Hidden files are macOS's attribute files and unfinished files of an interrupted run. Entries are not opened: a pipe
    named like a scan is returned, and reading it raises an error that names it.

    Raises:
        InputError: The folder cannot be listed.
    """
    return [path for path in listed(folder) if scan_ending(path) is not None and not path.name.startswith(".")]


def listed(folder: str | Path) -> list[Path]:
    """Returns all entries of a folder, sorted.

    Raises:
        InputError: The folder cannot be listed.
    """
    try:
        return sorted(Path(folder).iterdir())
    except OSError as error:
        raise InputError(f"the folder cannot be listed: {error.strerror}", where=str(folder)) from error
