"""Finds the scans among files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mome.errors import InputError
from mome.volumes import read_label_table
from mome.volumes.mask_names import file_part
from mome.volumes.other_files import series_hint
from mome.volumes.scan_files import DICOM_ENDINGS, ENDINGS_HINT, is_dicom_folder, is_nifti, listed, scans_in, stem


def find_scans(inputs: Sequence[str | Path]) -> list[Path]:
    """Returns files as they are given, and for a folder its scan files, sorted, without masks that `mome` wrote there.

    A folder of `.dcm` files is one scan. So is a folder of DICOM files without an ending, and a folder without files of
    a known ending; reading it says what is wrong with it.

    Hidden files of a folder are left out. Entries that cannot be read, such as a pipe named like a scan, stay in the
    list: segmenting them records the error, and the run goes on.

    Raises:
        InputError: A folder holds no scans, or the masks of two scans would have the same name.
    """
    scans: list[Path] = []
    for given in map(Path, inputs):
        scans += _scans_of_folder(given) if given.is_dir() else [given]
    owners: dict[str, Path] = {}
    for scan in scans:
        part = file_part(stem(scan))
        other = owners.setdefault(part, scan)
        if other is not scan:
            raise InputError(
                f"the masks of two scans would both be named {part!r}", where=f"{other} and {scan}", hint="rename one"
            )
    return scans


def _scans_of_folder(folder: Path) -> list[Path]:
    files = [path for path in listed(folder) if path.is_file() and not path.name.startswith(".")]
    if any(path.suffix.lower() in DICOM_ENDINGS for path in files):
        return [folder]
    volumes = scans_in(folder)
    scans = [path for path in volumes if not _is_mask(path)]
    if not scans and is_dicom_folder(folder):
        return [folder]
    if not scans and (volumes or not files):
        what = "the folder holds masks only, no scans" if volumes else "the folder holds no scans"
        if any(map(is_dicom_folder, listed(folder))):
            raise InputError(what, where=str(folder), hint=f"DICOM series are in its folders: {folder}/*")
        raise InputError(what, where=str(folder), hint=series_hint(folder) or ENDINGS_HINT)
    return scans or [folder]


def _is_mask(path: Path) -> bool:
    """Says whether a NIfTI file carries the label table that `mome` writes into masks."""
    if not is_nifti(path):
        return False
    try:
        return bool(read_label_table(path))
    except InputError:
        return False  # A broken scan is not left out: segmenting it records the error.
