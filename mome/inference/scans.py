"""Finds the scans among files, folders and archives."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mome.errors import InputError
from mome.inference.uncertainty_files import MAP_FOLDERS
from mome.printable import printable
from mome.volumes import read_label_table
from mome.volumes.archives import is_archive
from mome.volumes.mask_names import check_different_names, safe_characters
from mome.volumes.other_files import series_hint
from mome.volumes.scan_files import DICOM_ENDINGS, ENDINGS_HINT, is_dicom_folder, is_nifti, listed, scans_in, stem

logger = logging.getLogger(__name__)

# A search of a whole disk by mistake should end (our choices).
_DEEPEST, _MOST_ENTRIES = 16, 2_000_000
# In TotalSegmentator's data set, every subject's folder has this scan, and beside it a folder of its masks.
_TOTALSEGMENTATOR_SCAN, _TOTALSEGMENTATOR_MASKS = "ct.nii.gz", "segmentations"
# A folder with this file holds the masks of a run, and beside them its folders of maps.
_REPORT = "report.json"
# The longest name of a scan that is made of the folders it lies in.
_LONGEST_NAME = 100


@dataclass(frozen=True)
class NamedScan:
    """A scan and its name in the report.

    Attributes:
        name: The name.
        path: A file, a DICOM folder or a ZIP archive.
    """

    name: str
    path: Path


def find_named_scans(
    inputs: Sequence[str | Path], *, recursive: bool = False, leave_out: Path | None = None
) -> list[NamedScan]:
    """Returns the scans of files and folders, with their names; see `find_scans`. ZIP archives are scans here.

    A warning is logged of masks that are left out.

    Args:
        inputs: Files and folders.
        recursive: Also search the folders inside of a folder, except hidden ones and symbolic links. Every folder of
            DICOM files is a scan. A scan is named by its path below the folder that was given, as in
            `patient1_study2_series3`, so that scans of one name in different folders have different masks. A folder
            `segmentations` beside a `ct.nii.gz` holds the masks of TotalSegmentator's data set and is not searched,
            nor are the folders of maps (`mome.inference.uncertainty_files`) beside the report of an earlier run.
        leave_out: A folder that is not searched, such as that of the masks.

    Raises:
        InputError: A folder holds no scans, the masks of two scans would have the same name, or there are too many
            files and folders to search.
    """
    found: list[NamedScan] = []
    masks: list[Path] = []
    for given in map(Path, inputs):
        if not given.is_dir():
            found.append(NamedScan(stem(given), given))
        elif recursive:
            found += _below(given, leave_out, masks)
        else:
            found += [NamedScan(stem(path), path) for path in _with_archives(given, masks)]
    _say_what_is_left_out(masks)
    check_different_names((scan.name, scan.path) for scan in found)
    return found


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
    masks: list[Path] = []
    for given in map(Path, inputs):
        scans += _scans_of_folder(given, masks) if given.is_dir() else [given]
    _say_what_is_left_out(masks)
    check_different_names((stem(scan), scan) for scan in scans)
    return scans


def _say_what_is_left_out(masks: list[Path]) -> None:
    """Warns of masks, and of folders of masks, that are not segmented: one may be a scan for its user."""
    if masks:
        names = ", ".join(printable(str(path)) for path in masks[:3]) + (", …" if len(masks) > 3 else "")
        what = "1 mask or folder of masks is" if len(masks) == 1 else f"{len(masks)} masks or folders of masks are"
        logger.warning("%s left out as no scan, unless given by its path: %s", what, names)


def _without_masks(paths: list[Path], masks: list[Path]) -> list[Path]:
    """Returns the paths that are no masks of `mome`, and adds the others to `masks`."""
    scans: list[Path] = []
    for path in paths:
        (masks if _is_mask(path) else scans).append(path)
    return scans


def _with_archives(folder: Path, masks: list[Path]) -> list[Path]:
    """Returns the scans of a folder and its ZIP archives, sorted; a DICOM folder is one scan."""
    archives = _archives(folder)
    if not archives or is_dicom_folder(folder):
        return _scans_of_folder(folder, masks)
    return sorted([*_without_masks(scans_in(folder), masks), *archives])


def _archives(folder: Path) -> list[Path]:
    return [path for path in listed(folder) if is_archive(path) and not path.name.startswith(".")]


def _below(folder: Path, leave_out: Path | None, masks: list[Path]) -> list[NamedScan]:
    """Returns the scans in a folder and in all folders inside of it.

    Raises:
        InputError: There are none, or too many files and folders.
    """
    found = [
        NamedScan(_name_below(folder, path), path)
        for place in _folders(folder, leave_out, masks)
        for path in _held(place, masks)
    ]
    if not found:
        raise InputError("neither the folder nor those inside hold scans", where=str(folder), hint=ENDINGS_HINT)
    return found


def _held(folder: Path, masks: list[Path]) -> list[Path]:
    """Returns the scans that lie in a folder itself; none where it holds other files only."""
    if is_dicom_folder(folder):
        return [folder]
    files = [path for path in scans_in(folder) if not path.is_dir()]
    return sorted([*_without_masks(files, masks), *_archives(folder)])


def _folders(folder: Path, leave_out: Path | None, left_out: list[Path]) -> Iterator[Path]:
    """Yields a folder and those inside of it, sorted, except hidden ones, symbolic links and `leave_out`; folders of
    masks of TotalSegmentator's data set, and of maps of an earlier run, are added to `left_out`.
    """

    def stop(error: OSError) -> None:
        raise InputError(
            f"a folder cannot be listed: {error.strerror}",
            where=str(error.filename),
            hint="check its permissions, or give the folders that can be read",
        ) from error

    excluded = None if leave_out is None else os.path.realpath(leave_out)
    seen = 0
    for place, folders, files in os.walk(folder, onerror=stop):
        seen += len(folders) + len(files)
        path = Path(place)
        if seen > _MOST_ENTRIES or len(path.relative_to(folder).parts) > _DEEPEST:
            raise InputError(
                f"there are more than {_MOST_ENTRIES:,} files, or more than {_DEEPEST} levels of folders",
                where=str(folder),
                hint="give the folders that hold the scans",
            )
        results = [_TOTALSEGMENTATOR_MASKS] if _TOTALSEGMENTATOR_SCAN in files else []
        results += MAP_FOLDERS if _REPORT in files else []
        left_out += [path / name for name in results if name in folders]
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in results
            and not (path / name).is_symlink()
            and os.path.realpath(path / name) != excluded
        )
        if os.path.realpath(path) != excluded or path == folder:
            yield path


def _name_below(folder: Path, scan: Path) -> str:
    """Returns the name of a scan by its path below a folder; a long one keeps its end, behind a digest of the whole."""
    if scan == folder:
        return stem(scan)
    parts = [*scan.parent.relative_to(folder).parts, stem(scan)]
    name = "_".join(parts)
    if len(safe_characters(name)) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256("/".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{digest}_{name[-(_LONGEST_NAME - 10) :]}"


def _scans_of_folder(folder: Path, masks: list[Path]) -> list[Path]:
    files = [path for path in listed(folder) if path.is_file() and not path.name.startswith(".")]
    if any(path.suffix.lower() in DICOM_ENDINGS for path in files):
        return [folder]
    volumes = scans_in(folder)
    scans = _without_masks(volumes, masks)
    if not scans and is_dicom_folder(folder):
        return [folder]
    if not scans and (volumes or not files):
        what = "the folder holds masks only, no scans" if volumes else "the folder holds no scans"
        if any(map(is_dicom_folder, listed(folder))):
            raise InputError(
                what, where=str(folder), hint=f"DICOM series are in its folders: {folder}/*, or --recursive"
            )
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
