"""The members of a ZIP archive, checked before anything is unpacked: number, size, ratio, names, encryption."""

from __future__ import annotations

import stat
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mome.errors import InputError

# Our choices. A study of 10,000 slices of 512 × 512 has 5 GB; CT is compressed two- to fourfold, and archives that are
# compressed a hundredfold hold nothing, or far more than they seem to.
MOST_MEMBERS = 50_000
MOST_BYTES = 16 << 30
_LARGEST_RATIO, _SMALL_BYTES = 100, 64 << 20
_LARGEST_DIRECTORY = 8 << 20
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # bits of the general purpose flag (APPNOTE 4.4.4)
# The end of the directory, its ZIP64 record, and the locator of that record (APPNOTE 4.3.16, 4.3.14 and 4.3.15).
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END64_SIZE, _LOCATOR64_SIZE, _LONGEST_COMMENT = 22, 56, 20, 65_535
_HINT = "unpack it yourself and give the scan or the folder of the series"
_DISTRUST = "is it from somebody you trust?"


@dataclass(frozen=True)
class ArchiveMember:
    """A file of an archive.

    Attributes:
        number: Its place in the archive's directory, from 1.
        name: Its name there, with slashes; it is never used as a path.
        size: Its bytes when unpacked, as the directory says.
        info: What `zipfile` needs to open it.
    """

    number: int
    name: str
    size: int
    info: zipfile.ZipInfo


def checked_members(file: BinaryIO, archive: Path, free_bytes: int) -> tuple[list[ArchiveMember], int]:
    """Returns the regular, visible files of an archive, and the number of symbolic links that are left out.

    Args:
        file: The open archive.
        archive: Its path, for errors.
        free_bytes: The bytes that may be unpacked.

    Raises:
        InputError: It is no ZIP archive or damaged, a member is encrypted, compressed by another method than deflate,
            or has a name that leads out of the archive, or the archive has too many members or is too large unpacked.
    """
    _check_directory_size(file, archive)
    try:
        with zipfile.ZipFile(file) as opened:
            infos = opened.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise InputError(
            "this is no ZIP archive that can be read", where=str(archive), hint="download or export it again"
        ) from error
    if len(infos) > MOST_MEMBERS:
        raise InputError(
            f"the archive has {len(infos):,} members; the limit is {MOST_MEMBERS:,}", where=str(archive), hint=_HINT
        )
    members: list[ArchiveMember] = []
    links = 0
    for number, info in enumerate(infos, 1):
        name = info.filename.replace("\\", "/")
        parts = name.split("/")
        _check_name(name, parts, number, archive)
        if name.endswith("/") or any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            links += 1
            continue
        if info.flag_bits & _ENCRYPTED:
            raise InputError("the archive is encrypted", where=str(archive), hint=_HINT)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"the archive is compressed by the method {info.compress_type}; deflate is read",
                where=str(archive),
                hint=_HINT,
            )
        members.append(ArchiveMember(number, name, info.file_size, info))
    _check_sizes(members, file.seek(0, 2), archive, free_bytes)
    return members, links


def _check_directory_size(file: BinaryIO, archive: Path) -> None:
    """Checks the size of the directory, all of which `zipfile` reads into memory."""
    start = max(0, file.seek(0, 2) - _END_SIZE - _LONGEST_COMMENT)
    file.seek(start)
    tail = file.read()
    at = len(tail) - _END_SIZE
    if at < 0 or not (tail[at:].startswith(_END) and tail[-2:] == b"\0\0"):
        at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise InputError(
            "this is no ZIP archive, or it is truncated", where=str(archive), hint="download or export it again"
        )
    directory = struct.unpack_from("<I", tail, at + 12)[0]
    if sizes := _sizes_of_records64(file, start + at):
        directory = max(directory if directory != 0xFFFFFFFF else 0, *sizes)
    if directory > _LARGEST_DIRECTORY:
        raise InputError(
            f"the directory of the archive has {directory:,} bytes; the limit is {_LARGEST_DIRECTORY:,}",
            where=str(archive),
            hint=_HINT,
        )


def _sizes_of_records64(file: BinaryIO, end: int) -> list[int]:
    """Returns the sizes of the directory in ZIP64 records, of which `zipfile` reads one, whatever the end says.

    A record is where the locator says, or directly before the locator where bytes were put before the archive.

    Args:
        file: The open archive.
        end: The place of the end of the directory.
    """
    if end < _LOCATOR64_SIZE:
        return []
    file.seek(end - _LOCATOR64_SIZE)
    locator = file.read(_LOCATOR64_SIZE)
    if not locator.startswith(_LOCATOR64):
        return []
    sizes = []
    for place in (end - _LOCATOR64_SIZE - _END64_SIZE, struct.unpack_from("<Q", locator, 8)[0]):
        if 0 <= place <= end - _END64_SIZE:
            file.seek(place)
            record = file.read(_END64_SIZE)
            if record.startswith(_END64):
                sizes.append(struct.unpack_from("<Q", record, 40)[0])
    return sizes


def _check_name(name: str, parts: list[str], number: int, archive: Path) -> None:
    """Refuses names that lead out of the archive, although no name is used: such an archive means harm."""
    if ".." in parts or name.startswith("/") or ":" in parts[0] or "\0" in name:
        raise InputError(f"the name of member {number} leads out of the archive", where=str(archive), hint=_DISTRUST)


def _check_sizes(members: list[ArchiveMember], archive_bytes: int, archive: Path, free_bytes: int) -> None:
    total = sum(member.size for member in members)
    packed = sum(member.info.compress_size for member in members)
    what, hint = None, _HINT
    if total > MOST_BYTES:
        what = f"unpacked, the archive has {total / 1e9:,.4g} GB; the limit is {MOST_BYTES / 1e9:.4g} GB"
    elif packed > archive_bytes:
        what, hint = "the members of the archive overlap, as in a zip bomb", _DISTRUST
    elif total > _SMALL_BYTES and total > _LARGEST_RATIO * max(1, packed):
        what = f"unpacked, the archive is {total / max(1, packed):,.0f} times as large, as a zip bomb is"
        hint = _DISTRUST
    elif total > free_bytes:
        what = f"unpacked, the archive has {total / 1e9:,.3g} GB, and the disk has {free_bytes / 1e9:,.3g} GB free"
        hint = "free some disk space, or choose another folder"
    if what is not None:
        raise InputError(what, where=str(archive), hint=hint)
