"""File endings of scans: which files are scans, which library reads them, and their names without the ending."""

from __future__ import annotations

from pathlib import Path

NIFTI_ENDINGS = (".nii.gz", ".nii")
# NRRD and MetaImage, which SimpleITK reads. `.nhdr` and `.mhd` are headers whose voxels lie in another file.
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
ENDINGS_HINT = ".nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd"


def scan_ending(path: str | Path) -> str | None:
    """Returns the ending, in lower case, of a file that is a scan by its name, else None."""
    name = Path(path).name.lower()
    return next((ending for ending in (*NIFTI_ENDINGS, *ITK_ENDINGS) if name.endswith(ending)), None)


def is_nifti(path: str | Path) -> bool:
    """Says whether a file is NIfTI by its name."""
    return scan_ending(path) in NIFTI_ENDINGS


def stem(path: str | Path) -> str:
    """Returns the file's name without the ending of a scan, or without its last ending where it is no scan."""
    ending = scan_ending(path)
    return Path(path).stem if ending is None else Path(path).name[: -len(ending)]
