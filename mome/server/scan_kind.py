"""Recognises an uploaded scan by its first bytes. The client's file name decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mome.errors import InputError
from mome.volumes.streams import GZIP_MAGIC

_START = 512
_HINT = "upload one NIfTI, NRRD or MetaImage (.mha) file, a zip of DICOM files, or the DICOM files of one series"


def ending_of(path: Path) -> str | None:
    """Returns the ending that a file should have by its content, with the dot; None where it is no scan."""
    with open(path, "rb") as file:
        start = file.read(_START)
    if start[128:132] == b"DICM":
        return ".dcm"
    if start.startswith(GZIP_MAGIC):
        return ".nii.gz"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ".zip"
    if start.startswith(b"NRRD"):
        return ".nrrd"
    if start[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):  # 348 or 540, both orders
        return ".nii"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"objecttype", b"ndims", b"comment")) and b"=" in start:
        return ".mha"
    return None


def name_scan(folder: Path, files: Sequence[Path]) -> str:
    """Gives the uploaded files the endings of their formats.

    Args:
        folder: The folder that holds the files.
        files: The files in the order in which they came.

    Returns:
        The name inside `folder` of the scan: a file, or the folder `dicom`.

    Raises:
        InputError: There is no file, one file is no scan, or several files are no DICOM series.
    """
    where = "the field file"
    if not files:
        raise InputError("no file was uploaded", where=where, hint=_HINT)
    if len(files) == 1:
        ending = ending_of(files[0])
        if ending is None:
            what = "the file is empty" if files[0].stat().st_size == 0 else "the file is no scan that can be read"
            raise InputError(what, where=where, hint=_HINT)
        scan = folder / f"scan{ending}"
        files[0].rename(scan)
        return scan.name
    endings = {ending_of(file) for file in files}
    # Old DICOM files have no letters DICM; they are read where others of the series have them.
    if ".dcm" not in endings or endings - {".dcm", None}:
        raise InputError(f"{len(files)} files were uploaded, and they are no DICOM series", where=where, hint=_HINT)
    (folder / "dicom").mkdir(mode=0o700)
    for number, file in enumerate(files):
        file.rename(folder / "dicom" / f"{number:06d}.dcm")
    return "dicom"
