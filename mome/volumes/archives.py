"""ZIP archives that hold a scan: they are checked, then unpacked under names of our own into a temporary folder.

An archive may come from anybody. No name in it is ever used as a path, what its members say of themselves is compared
with what they hold, and the temporary folder is removed whatever happens; after SIGKILL the next run removes it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mome.atomic import output_errors
from mome.errors import InputError
from mome.temporary_names import remove_stale_parts, temporary_path
from mome.volumes.archive_members import ArchiveMember, checked_members
from mome.volumes.open_file import open_regular
from mome.volumes.scan_files import DICOM_ENDINGS, MEDIA_FILES, scan_ending

_ENDING = ".zip"
_CHUNK = 1 << 20
_DICOM_PREFIX_AT, _DICOM_PREFIX = 128, b"DICM"
_ARCHIVE_STARTS = (b"PK\x03\x04", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh")
_TAR_MAGIC, _TAR_AT = b"ustar", 257
# Headers whose voxels lie in another file, which they name; names of an archive are not used.
_DETACHED_ENDINGS = (".nhdr", ".mhd")
# Where so many are unpacked, the disk is left this much space (our choice).
_SPARE_BYTES = 256 << 20


@dataclass
class Unpacked:
    """What an archive held.

    Attributes:
        archive: The archive.
        path: The folder with the DICOM files, or the file of the scan. It is there until the block of `unpacked` ends.
        notes: Sentences about members that are left out.
    """

    archive: Path
    path: Path
    notes: tuple[str, ...] = ()

    def renamed(self, error: InputError) -> InputError:
        """Returns an error of reading `path` with the archive in its place, which is the file that the user knows."""
        inside, name = str(self.path), str(self.archive)
        hint = error.hint.replace(inside, name) if error.hint else None
        return InputError(error.what.replace(inside, name), where=name, hint=hint)


@dataclass
class _Found:
    """Members that were unpacked or left out."""

    scans: list[Path] = field(default_factory=list)
    slices: list[Path] = field(default_factory=list)
    unsure: list[tuple[Path, str]] = field(default_factory=list)
    dicom_folders: set[str] = field(default_factory=set)
    archives: int = 0
    detached: int = 0


def is_archive(path: str | Path) -> bool:
    """Says whether a file is a ZIP archive by its name."""
    path = Path(path)
    return path.name.lower().endswith(_ENDING) and path.is_file()


@contextlib.contextmanager
def unpacked(archive: str | Path, folder: str | Path | None = None) -> Iterator[Unpacked]:
    """Unpacks the scan of a ZIP archive for the length of the block.

    DICOM files of all folders of the archive come into one folder; `DicomOptions.series` chooses among several series.
    Files are named by the number of their member, in the order of the archive's directory. Hidden files, indices of
    media, other archives and symbolic links are left out.

    Args:
        archive: The archive. `mome.volumes.archive_members` has the limits.
        folder: The folder in which the temporary folder is made; the system's for temporary files where None.

    Yields:
        What it held.

    Raises:
        InputError: It is no ZIP archive, damaged, encrypted or too large; a member lies about its size or its name
            leads out of the archive; it holds no scan, or several files that are scans.
        OutputError: The disk is full.
    """
    archive = Path(archive)
    parent = Path(tempfile.gettempdir() if folder is None else folder)
    if folder is None:
        remove_stale_parts(parent, earlier_names=False)
    with open_regular(archive) as file:
        members, links = checked_members(file, archive, _free_bytes(parent))
        place = temporary_path(parent / "scan")
        try:
            with output_errors(parent, "the unpacked archive"):
                parent.mkdir(parents=True, exist_ok=True)
                place.mkdir(mode=0o700)  # an existing folder, or a link, is an error
            found = _unpack(file, members, archive, place)
            path = _chosen(found, archive, place)
            yield Unpacked(archive, path, _notes(found, links))
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _free_bytes(folder: Path) -> int:
    """Returns the bytes that may be unpacked into a folder, which may be missing yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return max(0, shutil.disk_usage(there).free - _SPARE_BYTES)


def _unpack(file: BinaryIO, members: list[ArchiveMember], archive: Path, place: Path) -> _Found:
    found = _Found()
    try:
        with zipfile.ZipFile(file) as opened:
            for member in members:
                if PurePosixPath(member.name).name.lower() in MEDIA_FILES:
                    continue
                try:
                    with opened.open(member.info) as stream:
                        _unpack_member(stream, member, archive, place, found)
                except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
                    raise _damaged(archive, f"member {member.number} cannot be read") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(archive, "its directory cannot be read") from error
    return found


def _unpack_member(stream: object, member: ArchiveMember, archive: Path, place: Path, found: _Found) -> None:
    """Stores a member under its number if it may be a scan or a slice."""
    read = stream.read  # type: ignore[attr-defined]
    start = read(_CHUNK)
    name = PurePosixPath(member.name)
    ending, suffix = scan_ending(name.name), name.suffix.lower()
    target = place / f"{member.number:05d}"
    is_dicom = start[_DICOM_PREFIX_AT:].startswith(_DICOM_PREFIX)
    is_gzip_scan = ending is not None and ending.endswith(".gz")
    if not is_gzip_scan and (start.startswith(_ARCHIVE_STARTS) or start[_TAR_AT:].startswith(_TAR_MAGIC)):
        found.archives += 1
        return
    if ending in _DETACHED_ENDINGS:
        found.detached += 1
        return
    if ending is not None:
        target = target.with_name(target.name + ending)
        found.scans.append(target)
    elif is_dicom or suffix in DICOM_ENDINGS:
        target = target.with_name(target.name + (suffix if suffix in DICOM_ENDINGS else ""))
        found.slices.append(target)
        if is_dicom:
            found.dicom_folders.add(str(name.parent))
    elif suffix == "" or suffix[1:].isdigit():
        found.unsure.append((target, str(name.parent)))  # a slice without the prefix, if slices lie beside it
    else:
        return
    count = 0
    with output_errors(place.parent, "the unpacked archive", target), open(target, "xb") as out:
        while start:
            count += len(start)
            if count > member.size:
                raise _damaged(archive, f"member {member.number} holds more than the archive's directory says")
            out.write(start)
            start = read(_CHUNK)
    if count != member.size:
        raise _damaged(archive, f"member {member.number} holds less than the archive's directory says")


def _chosen(found: _Found, archive: Path, place: Path) -> Path:
    """Returns the file or the folder to read."""
    for path, folder in found.unsure:
        if folder in found.dicom_folders:
            found.slices.append(path)
        else:
            path.unlink()
    hint = "unpack it and give the folder of the scans"
    if len(found.scans) > 1 or (found.scans and found.slices):
        held = f"{len(found.scans)} files that are scans" + (" and DICOM files" if found.slices else "")
        raise InputError(f"the archive holds {held}, and not one scan", where=str(archive), hint=hint)
    if found.scans:
        return found.scans[0]
    if found.slices:
        return place
    others = "archives" if found.archives else "headers whose voxels lie in another file" if found.detached else ""
    raise InputError(
        f"the archive holds {others or 'no scan: no DICOM file, NIfTI, NRRD or MetaImage'}",
        where=str(archive),
        hint=hint if others else "is it the right archive?",
    )


def _notes(found: _Found, links: int) -> tuple[str, ...]:
    left = [(found.archives, "archive"), (links, "symbolic link"), (found.detached, "detached header")]
    named = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in left if count]
    return (f"left out of the ZIP archive: {', '.join(named)}",) if named else ()


def _damaged(archive: Path, why: str) -> InputError:
    return InputError(f"the archive is damaged: {why}", where=str(archive), hint="download or export it again")
