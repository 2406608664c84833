"""The DICOM files of a folder: slices of CT, other images, and files that are damaged or do not say where they lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mome.errors import InputError
from mome.git_lfs import POINTER_START
from mome.volumes.dicom.damaged import DamagedFile
from mome.volumes.dicom.elements import printable
from mome.volumes.dicom.headers import ImageHeader, read_header
from mome.volumes.dicom.kinds import reason_not_ct
from mome.volumes.dicom.quiet import quiet_decoders
from mome.volumes.dicom.slices import Slice, slices_of
from mome.volumes.other_files import is_compressed_slice, other_kind
from mome.volumes.scan_files import DICOM_ENDINGS, MEDIA_FILES, has_dicom_prefix

# Elements without which stored pixels have no meaning (DICOM PS3.3 C.7.6.3, all of type 1).
_OF_PIXELS = ("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation")


@dataclass(frozen=True)
class UnusableFile:
    """A file that cannot become a slice.

    Attributes:
        name: The file's name.
        reason: What is wrong with it.
        series_uid: Its series, or None where its header cannot be read.
    """

    name: str
    reason: str
    series_uid: str | None = None


@dataclass
class DicomFiles:
    """What the files of a folder hold.

    Attributes:
        slices: The slices of all CT images whose headers say where they lie.
        others: The headers of images that are no CT.
        damaged: Files that are truncated or cannot be read.
        unplaced: CT images whose headers do not say where they lie.
        objects: Kind → number of files without an image, such as RT structure sets.
    """

    slices: list[Slice] = field(default_factory=list)
    others: list[ImageHeader] = field(default_factory=list)
    damaged: list[UnusableFile] = field(default_factory=list)
    unplaced: list[UnusableFile] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)


def read_files(paths: list[Path]) -> DicomFiles:
    """Reads the headers of files. A file that is no DICOM by its content and its name is skipped."""
    found = DicomFiles()
    endings = {_ending(path) for path in paths if has_dicom_prefix(path)} | set(DICOM_ENDINGS)
    with quiet_decoders():
        for path in paths:
            if is_compressed_slice(path):
                found.damaged.append(UnusableFile(printable(path.name, 200), "compressed as a whole: decompress it"))
            elif has_dicom_prefix(path) or (_ending(path) in endings and _could_be_a_slice(path)):
                _read_file(path, found)
    return found


def folder_files(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are no folders, sorted, without hidden files and those of media and systems.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if not path.name.startswith(".") and path.name.lower() not in MEDIA_FILES and not path.is_dir()
        )
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror}", where=str(folder), hint="check its permissions"
        ) from error


def _read_file(path: Path, found: DicomFiles) -> None:
    """Reads the header of a file and adds what it holds to `found`."""
    series: str | None = None
    try:
        if not path.is_file():
            raise DamagedFile("no regular file")
        other = other_kind(path)
        if other is not None:
            raise DamagedFile(other[0])
        header, dataset = read_header(path)
        series = header.series_uid
        not_ct = reason_not_ct(header)
        if not_ct is not None:
            if header.has_pixels:
                found.others.append(header)
            elif header.is_truncated:
                raise DamagedFile("truncated")
            else:
                found.objects[not_ct] += 1
            return
        if header.is_truncated or not header.has_pixels:
            raise DamagedFile("truncated")
        if header.is_too_long:
            raise DamagedFile("more pixels than its header says")
        if min(header.rows, header.columns) < 1:
            raise DamagedFile("its header gives no size")
        missing_element = next((keyword for keyword in _OF_PIXELS if dataset.get(keyword) is None), None)
        if missing_element is not None:
            raise DamagedFile(f"its header has no {missing_element}, without which pixels cannot be read")
        allocated, stored, high = header.bits
        if not 1 <= stored <= high + 1 <= allocated:
            raise DamagedFile(f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}: a contradiction")
        slices = slices_of(header, dataset)
    except DamagedFile as error:
        found.damaged.append(UnusableFile(printable(path.name, 200), str(error), series))
        return
    found.slices += [image for image in slices if image.missing_geometry is None]
    missing = [image.missing_geometry for image in slices if image.missing_geometry and not image.is_localizer]
    if missing:
        found.unplaced.append(UnusableFile(printable(path.name, 200), f"no valid {missing[0]}", series))


def _ending(path: Path) -> str:
    """Returns the ending in lower case; digits after the last dot are a part of a UID, not an ending."""
    ending = path.suffix.lower()
    return "" if ending[1:].isdigit() else ending


def _could_be_a_slice(path: Path) -> bool:
    """Says whether a file without the DICOM prefix may be a slice: one that is named `.dcm`, empty, or not a text."""
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return True  # Reading its header says what is wrong.
    is_text = all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start)
    return not is_text or not start or start.startswith(POINTER_START)
