"""Files given in place of a scan: archives, pointers of Git LFS, indices of DICOM media, web pages, folders."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from mome.errors import InputError
from mome.git_lfs import POINTER_START
from mome.printable import printable
from mome.volumes.scan_files import DICOM_ENDINGS, ENDINGS_HINT, is_dicom_folder, scan_ending

# First bytes of a file → what it is, and what to do.
_CONTENTS = (
    (POINTER_START, "a Git LFS pointer, not the scan itself", "fetch the scan: git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the scan itself", "fetch the scan: git annex get"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it and give the scan or the folder of the series"),
    (b"PK\x05\x06", "an empty ZIP archive", "download it again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the scan or the folder of the series"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it and give the scan or the folder of the series"),
    (b"\xfd7zXZ\x00", "a file compressed by xz", "unpack it and give the scan or the folder of the series"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd", "unpack it and give the scan or the folder of the series"),
    (b"<!DOCTYPE", "a web page, not the scan itself", "download the scan again; the link may need a login"),
    (b"<!doctype", "a web page, not the scan itself", "download the scan again; the link may need a login"),
    (b"<html", "a web page, not the scan itself", "download the scan again; the link may need a login"),
)  # fmt: skip
_GZIP, _BZIP2 = b"\x1f\x8b", b"BZh"
_TAR_MAGIC, _TAR_AT = b"ustar", 257
_DICOMDIR = "dicomdir"
_MEDIA_DIRECTORY = b"1.2.840.10008.1.3.10"
# Folders of studies have up to this many levels; a search of a whole disk would take too long.
_DEEPEST, _MOST_ENTRIES = 5, 5_000
_MOST_NAMED = 3


def other_kind(path: str | Path) -> tuple[str, str] | None:
    """Returns what a regular file is instead of a scan, and what to do about it; None where it may be a scan."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None  # Reading it as a scan says what is wrong.
    for first, what, hint in _CONTENTS:
        if start.startswith(first):
            return what, hint
    if start[_TAR_AT:].startswith(_TAR_MAGIC):
        return "a TAR archive", "unpack it and give the scan or the folder of the series"
    if path.name.lower() == _DICOMDIR or (start[128:132] == b"DICM" and _MEDIA_DIRECTORY in start):
        folders = [f for f in _folders_below(path.parent) if is_dicom_folder(f)]
        return "a DICOMDIR, the index of the files of a DICOM medium", _which(folders, "the folder of the series")
    if scan_ending(path) is None and start.startswith((_GZIP, _BZIP2)):
        how = "gzip" if start.startswith(_GZIP) else "bzip2"
        return f"a file compressed by {how}", "decompress it and give the scan or the folder of the series"
    return None


def check_no_other_kind(path: str | Path) -> None:
    """Checks that a file is not one of the kinds that are given by mistake in place of a scan.

    Raises:
        InputError: It is; the message says what it is and what to do.
    """
    found = other_kind(path)
    if found is not None:
        raise InputError(f"this is {found[0]}", where=str(path), hint=found[1])


def no_scan_in(folder: str | Path) -> InputError:
    """Returns the error for a folder without a scan: it says what the folder holds instead and what to give."""
    folder = Path(folder)
    hint = series_hint(folder)
    if hint is not None:
        return InputError(
            "the folder holds no DICOM images itself; they are in its folders", where=str(folder), hint=hint
        )
    for path in _files(folder):
        found = other_kind(path)
        if found is not None:
            name = printable(path.name)[:60]
            return InputError(
                f"the folder holds no DICOM images; {name} is {found[0]}", where=str(folder), hint=found[1]
            )
    return InputError(
        "the folder holds no DICOM images", where=str(folder), hint=f"give a DICOM series, or {ENDINGS_HINT}"
    )


def series_hint(folder: Path) -> str | None:
    """Returns which folders below a folder hold DICOM series, or None where there are none."""
    found = [below for below in _folders_below(folder) if is_dicom_folder(below)]
    return _which(found, "") if found else None


def is_compressed_slice(path: Path) -> bool:
    """Says whether a file is a DICOM slice compressed as a whole, as `001.dcm.gz`."""
    inner = Path(path.stem).suffix.lower()
    return path.suffix.lower() in (".gz", ".bz2", ".xz", ".zip") and (inner in DICOM_ENDINGS or path.stem.isdigit())


def _which(folders: list[Path], otherwise: str) -> str:
    if not folders:
        return f"give {otherwise}"
    named = ", ".join(printable(str(folder))[:120] for folder in folders[:_MOST_NAMED])
    more = f" and {len(folders) - _MOST_NAMED} more" if len(folders) > _MOST_NAMED else ""
    return f"give the folder of a series: {named}{more}"


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(itertools.islice(folder.iterdir(), _MOST_ENTRIES))
    except OSError:
        return
    yield from (path for path in entries if path.is_file() and not path.name.startswith("."))


def _folders_below(folder: Path) -> list[Path]:
    """Returns the folders below a folder, sorted; symbolic links are not followed."""
    found: list[Path] = []
    seen = 0
    for parent, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        depth = len(Path(parent).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEEPEST else []
        found += [Path(parent) / name for name in folders if not (Path(parent) / name).is_symlink()]
        if seen > _MOST_ENTRIES:
            break
    return found
