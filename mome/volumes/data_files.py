"""Lists the files that make up a scan, and identifies their content by sizes and times."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.volumes.metaimage import read_metaimage_header
from mome.volumes.nrrd import read_nrrd_header
from mome.volumes.scan_files import MEDIA_FILES, METAIMAGE_ENDINGS, NRRD_ENDINGS, listed, scan_ending

# Endings of what a run may write into the folder of a DICOM series.
_BESIDE = (".json", ".csv", ".html", ".png")


def files_of_scan(scan: str | Path) -> list[Path]:
    """Returns the files of a scan: itself, the data files that its header names, or what is read of a folder.

    A header that cannot be read names no files: reading the scan raises the error.
    """
    scan = Path(scan)
    if scan.is_dir():  # masks and a report may be written beside the slices; they are no part of the scan
        return [path for path in listed(scan) if path.is_file() and not _is_no_slice(path)]
    ending = scan_ending(scan)
    try:
        if ending in NRRD_ENDINGS:
            return list(dict.fromkeys([scan, *read_nrrd_header(scan).data.paths(scan)]))
        if ending in METAIMAGE_ENDINGS:
            return list(dict.fromkeys([scan, *read_metaimage_header(scan).data.paths(scan)]))
    except (InputError, OSError, ValueError, EOFError):
        pass
    return [scan]


def _is_no_slice(path: Path) -> bool:
    """Says whether a file beside slices is none of them: a mask, a report, a table, a page or a preview, or a file that
    a system or a viewer put there, which the reader leaves out.
    """
    is_of_system = path.name.startswith(".") or path.name.lower() in MEDIA_FILES
    return is_of_system or scan_ending(path) is not None or path.suffix.lower() in _BESIDE


def identity(scan: str | Path) -> dict[str, Any]:
    """Returns the bytes of all files of a scan and the time of the last change (ns).

    For a scan of several files, `files` is a digest of the name, size and time of each, so that a replaced file is
    noticed even if it is older than the others.
    """
    paths = files_of_scan(scan)
    found = [(path.name, stat) for path in paths if (stat := _stat(path)) is not None]
    result: dict[str, Any] = {
        "bytes": sum(stat.st_size for _, stat in found),
        "modified_ns": max((stat.st_mtime_ns for _, stat in found), default=0),
    }
    if len(paths) > 1:
        result["files"] = _digest([f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}" for name, stat in found])
    return result


def _stat(path: Path) -> os.stat_result | None:
    """Returns the size and times of a file; None where there is none, or its links go in a circle."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
