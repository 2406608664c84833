"""Which files are scans, which library reads them, and their names without the ending. Every command asks here."""

from __future__ import annotations

from pathlib import Path

from mome.errors import InputError

NIFTI_ENDINGS = (".nii.gz", ".nii")
# NRRD and MetaImage. `.nhdr` and `.mhd` are headers whose voxels lie in another file.
NRRD_ENDINGS = (".nrrd", ".nhdr")
METAIMAGE_ENDINGS = (".mha", ".mhd")
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


def stem(path: str | Path) -> str:
    """Returns the file's name without the ending of a scan, or without its last ending where it is no scan."""
    ending = scan_ending(path)
    return Path(path).stem if ending is None else Path(path).name[: -len(ending)]


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
