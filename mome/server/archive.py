"""Unpacks a zip of DICOM files. Names in the archive decide nothing: files are numbered in their order."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from mome.errors import InputError

_MOST_FILES = 20_000
_MOST_BYTES = 8 * 10**9
# CT compresses to a half, and uniform slices to a few percent; a bomb has a ratio of hundreds (our choice).
_LARGEST_RATIO = 200
_SMALL = 10 * 2**20  # below this size, the ratio does not matter
_CHUNK = 1 << 20
_HINT = "upload the DICOM files of one series"


def unpack_dicom(archive: Path, folder: Path) -> None:
    """Writes the files of an archive to `folder` as `000000.dcm`, `000001.dcm` and so on.

    Directories inside the archive are left out, as are hidden files and macOS's attribute files.

    Args:
        archive: The zip file.
        folder: An empty folder.

    Raises:
        InputError: The archive is damaged or encrypted, or it is larger unpacked than any series. Sizes are counted as
            data come, because the headers of an archive may lie.
        OSError: The disk is full.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [entry for entry in opened.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
            if not members:
                raise InputError("the archive holds no files", hint=_HINT)
            if len(members) > _MOST_FILES:
                raise InputError(f"the archive holds more than {_MOST_FILES} files", hint=_HINT)
            if any(entry.flag_bits & 1 for entry in members):
                raise InputError("the archive is encrypted", hint="pack it without a password")
            allowed = min(_MOST_BYTES, max(_SMALL, _LARGEST_RATIO * archive.stat().st_size))
            for number, entry in enumerate(members):
                with opened.open(entry) as source, open(folder / f"{number:06d}.dcm", "xb") as target:
                    while part := source.read(_CHUNK):
                        allowed -= len(part)
                        if allowed < 0:
                            raise InputError("the archive is much larger unpacked than a series can be", hint=_HINT)
                        target.write(part)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the archive is damaged or of a kind that is not read", hint=_HINT) from error


def _is_hidden(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts or parts[-1].upper() == "DICOMDIR"
