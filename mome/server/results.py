"""The formats of results: which there are, and how the worker writes them. Every format becomes one file."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.errors import InputError, did_you_mean
from mome.volumes.writers import WRITERS

if TYPE_CHECKING:
    from mome.inference.result import Segmentation
    from mome.volumes import Volume

# Format → media type of a single file.
_MEDIA = {
    ".zip": "application/zip",
    ".gz": "application/gzip",
    ".dcm": "application/dicom",
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".nrrd": "application/octet-stream",
}
# Formats that are a writer with a setting. Clients choose among names only, because names become those of files.
_CONFIGURED = {"dicom_seg_binary": "dicom_seg(kind=binary)"}
# The name in the scan's place of file names, as in scan_mandible.nii.gz.
STEM = "scan"


def formats() -> list[str]:
    """Returns the formats that clients may ask for: those of this module, and those of the mask writers."""
    own = ("multilabel", "json", "html", "image", "nrrd", "viewer")
    return list(dict.fromkeys([*WRITERS.names(), *_CONFIGURED, *own]))


def writer_of(name: str) -> str | None:
    """Returns the config string of the mask writer of a format; None for the formats of this module."""
    return name if name in WRITERS.names() else _CONFIGURED.get(name)


def check_formats(asked: Sequence[str]) -> list[str]:
    """Returns the formats, each once; `json` is always among them.

    Raises:
        InputError: There is no such format.
    """
    known = formats()
    for name in asked:
        if name not in known:
            raise InputError(
                f"there is no format {name[:40]!r}{did_you_mean(name[:40], known)}",
                where="the field output",
                hint="formats: " + ", ".join(known),
            )
    return list(dict.fromkeys([*(asked or ["nifti"]), "json"]))


def result_file(folder: Path, name: str) -> Path | None:
    """Returns the file of a format in the folder of a job; None where that format was not made.

    Args:
        folder: The job's folder.
        name: One of `formats()`.
    """
    found = [path for path in (folder / "result").glob(f"{name}.*") if path.is_file()]
    return found[0] if found else None


def media_type(path: Path) -> str:
    """Returns the media type of a result."""
    return _MEDIA.get(path.suffix, "application/octet-stream")


def write_results(
    result: Segmentation, scan: Path, folder: Path, asked: Sequence[str], model: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Writes the results of a job.

    Args:
        result: The masks.
        scan: The scan that was read.
        folder: The folder of the results; what an earlier attempt left there is replaced.
        asked: The formats.
        model: The name of the model.
        options: `frame` and `dicom`, with which the scan was read, and `nrrd`, the `gzip`, `dtype` and `ids` of a map.

    Returns:
        The summary: `structures`, `overlapping_voxels`, `notes`, `seconds`, `statistics`, `model`, `mome`, `shape`,
        `spacing_mm`, and `formats` with the bytes of each.

    Raises:
        InputError: A writer cannot write this scan.
        OutputError: The disk is full.
    """
    from mome.atomic import atomic_write, output_errors
    from mome.volumes import read_volume

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    volume = None
    if not {"html", "image", "viewer"}.isdisjoint(asked):
        volume = read_volume(scan, frame=options["frame"], dicom=options["dicom"])
    summary: dict[str, Any] = {
        "structures": [],
        "overlapping_voxels": None,
        "notes": [],
        "seconds": result.seconds,
        "statistics": result.statistics,
        "model": model,
        "mome": version("mome"),
        "shape": list(result.grid.shape),
        "spacing_mm": [round(step, 6) for step in result.grid.spacing],
        "formats": {},
    }
    for name in asked:
        if name == "json":
            continue
        parts = folder / "parts"
        with output_errors(folder, "the results"):
            parts.mkdir(mode=0o700)
        files = _written(result, volume, parts, name, options)
        with output_errors(folder, "the results"):
            if len(files) == 1:
                target = folder / f"{name}{_ending(files[0])}"
                files[0].rename(target)
            else:
                target = folder / f"{name}.zip"
                with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # the files are compressed
                    for file in files:
                        archive.write(file, file.name)
            shutil.rmtree(parts)
        summary["formats"][name] = target.stat().st_size
    # Writers have added their notes, and a map of ids has told what it holds.
    summary["notes"] = list(dict.fromkeys(result.notes))
    summary["structures"], summary["overlapping_voxels"] = result.summary(), result.overlapping_voxels
    with atomic_write(folder / "json.json", "the summary") as temporary:
        temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    summary["formats"]["json"] = (folder / "json.json").stat().st_size
    return summary


def _written(
    result: Segmentation, volume: Volume | None, folder: Path, name: str, options: dict[str, Any]
) -> list[Path]:
    """Writes one format into a folder and returns its files."""
    if name == "multilabel":
        return result.save(folder, STEM, multilabel=True)
    if volume is not None:
        if name == "html":
            return [result.save_html(folder / "scan.html", volume, "mome")]
        if name == "image":
            from mome.server.scan_image import write_image

            return [write_image(volume, folder / "scan.nii.gz")]
        if name == "viewer":
            from mome.server.viewer_data import write_viewer

            return [write_viewer(result, volume, folder / "scan.json")]
    if name == "nrrd":
        from mome.server.nrrd_map import write_nrrd_map

        how = options["nrrd"]
        return [
            write_nrrd_map(
                result,
                folder / "scan.nrrd",
                compress=bool(how.get("gzip")),
                dtype=how.get("dtype"),
                known_ids=how.get("ids"),
            )
        ]
    return result.save(folder, STEM, writer=writer_of(name) or name)


def _ending(path: Path) -> str:
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
