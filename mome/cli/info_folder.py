"""What a folder of scans holds, for `mome info FOLDER`: its scan files, ZIP archives and folders of DICOM series."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError
from mome.printable import printable
from mome.volumes.archives import is_archive
from mome.volumes.scan_files import is_dicom_folder, is_nifti, listed, scans_in


def scans_below(folder: Path) -> list[dict[str, Any]]:
    """Returns the scans that lie in a folder, and the folders in it that hold DICOM files, sorted by name.

    Only headers of NIfTI files are read. Nothing is unpacked.

    Args:
        folder: A folder that is neither a model nor a DICOM series.

    Returns:
        `name`, `kind` (`scan`, `masks`, `ZIP archive` or `DICOM folder`) and, for NIfTI files, `shape` and
        `spacing (mm)`, or `error` where the header cannot be read.

    Raises:
        InputError: The folder cannot be listed.
    """
    files = {path: "scan" for path in scans_in(folder) if not path.is_dir()}
    for path in listed(folder):
        if not path.name.startswith(".") and path not in files:
            if is_archive(path):
                files[path] = "ZIP archive"
            elif is_dicom_folder(path):
                files[path] = "DICOM folder"
    return [{"name": path.name, **_described(path, kind)} for path, kind in sorted(files.items())]


def held_lines(held: Iterable[dict[str, Any]]) -> list[str]:
    """Returns a line for each entry of `scans_below`, as it is printed."""
    lines = []
    for entry in held:
        size = " × ".join(map(str, entry.get("shape", [])))
        spacing = " × ".join(f"{value:g}" for value in entry.get("spacing (mm)", []))
        parts = [entry["kind"], size, f"{spacing} mm" if spacing else "", entry.get("error", "")]
        lines.append(printable(f"{entry['name']}  " + ", ".join(filter(None, parts))))
    return lines


def _described(path: Path, kind: str) -> dict[str, Any]:
    if kind != "scan" or not is_nifti(path):
        return {"kind": kind}
    from mome.volumes import read_label_table
    from mome.volumes.nifti import nifti_geometry

    try:
        shape, affine = nifti_geometry(path)
        kind = "masks" if read_label_table(path) else kind
    except InputError as error:
        return {"kind": kind, "error": error.what}
    except (EOFError, OSError, zlib.error) as error:
        return {"kind": kind, "error": f"it cannot be read: {error}"}
    spacing = [round(float(step), 4) for step in np.linalg.norm(affine[:3, :3], axis=0)]
    return {"kind": kind, "shape": list(shape), "spacing (mm)": spacing}
