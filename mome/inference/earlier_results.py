"""Results that lie in a folder already: whether new ones of the same names would replace those of another scan.

A NIfTI mask says in its header of which scan it is, a DICOM object says of which series. Of other files, and of masks
of earlier versions, the report of a run in the same folder may know it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.inference.earlier_runs import run_that_wrote
from mome.inference.fingerprint import scan_identity
from mome.inference.report import read_report
from mome.volumes import Grid
from mome.volumes.dicom.source import SOURCE_KEY, SourceSlices
from mome.volumes.dicom_out.earlier_objects import referenced_series
from mome.volumes.earlier_masks import refuse_masks_on_other_grids, scan_of_mask
from mome.volumes.scan_files import is_nifti


def refuse_results_of_others(
    paths: Iterable[Path], grid: Grid, digest: str, header: dict[str, Any], source: Path | None
) -> None:
    """Checks that no file which would be replaced is known to be of another scan.

    Args:
        paths: The files that will be written, all in one folder.
        grid: The grid of the scan.
        digest: `mome.volumes.scan_digest.scan_digest` of the scan; empty where it is not known.
        header: `Volume.header` of the scan.
        source: The scan's file or DICOM folder; None where it was passed as an array.

    Raises:
        InputError: A file is: it lies on another grid, is of a scan of other HU, refers to another DICOM series or to
            none, or the report lists it for another scan. What nothing is known of may be replaced.
    """
    there = [path for path in paths if path.is_file()]
    refuse_masks_on_other_grids(there, grid)
    for path in there:
        if _is_of_scan(path, digest, header, source) is False:
            raise InputError(
                "the file is there already, and is not a mask of this scan",
                where=str(path) if source is None else f"{path}, of {source}",
                hint="another folder or name, or overwrite=True",
            )


def _is_of_scan(path: Path, digest: str, header: dict[str, Any], source: Path | None) -> bool | None:
    """Says whether a file is of a scan; None where nothing is known."""
    if is_nifti(path):
        of_mask = scan_of_mask(path)
        if of_mask and digest:
            return of_mask == digest
    slices = header.get(SOURCE_KEY)
    if path.suffix.lower() == ".dcm" and isinstance(slices, SourceSlices):
        series = referenced_series(path)
        if series is not None:
            return slices.slices[0].header.series_uid in series
    return _is_listed_for(path, source)


def _is_listed_for(path: Path, source: Path | None) -> bool | None:
    """Says whether the report in the folder lists a file for a scan; None where it does not list it."""
    if source is None or not source.exists():
        return None
    try:
        entries = read_report(path.parent / "report.json").values()
    except InputError:  # it is of another program
        return None
    scans = [run.get("scan") for entry in entries if (run := run_that_wrote(entry, path.name))]
    return scan_identity(source) in scans if scans else None
