"""Reads MetaImage files. Source: the format's documentation at itk.org/Wiki/MetaIO/Documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.metaimage_geometry import metaimage_affine
from mome.volumes.not_ct import modality_not_ct
from mome.volumes.open_file import open_regular
from mome.volumes.raw_data import (
    MOST_FILES,
    RawData,
    as_stored,
    damaged,
    file_pattern,
    numbers,
    sizes,
    whole_number,
)
from mome.volumes.sizes import check_size
from mome.volumes.stored import StoredVolume, three_dimensions

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_LONGEST_LINE, _MOST_LINES = 1 << 16, 10_000
# Names of one field in files of different age.
_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")
_BIG_ENDIAN = ("binarydatabyteordermsb", "elementbyteordermsb")


@dataclass(frozen=True)
class MetaImageHeader:
    """The content of the header of a MetaImage.

    Attributes:
        fields: Field, in lower case → its text.
        data: Where the voxels are.
    """

    fields: dict[str, str]
    data: RawData


def read_metaimage(path: Path, frame: int | None = None) -> StoredVolume:
    """Reads a `.mha` or `.mhd` file.

    Args:
        path: The file.
        frame: The volume to take along the fourth axis; see `mome.volumes.read.read_volume`.

    Raises:
        InputError: A field is missing or damaged, the file holds colours, or its data are elsewhere or too short.
        EOFError, OSError, ValueError, zlib.error: The data are damaged.
    """
    header = read_metaimage_header(path)
    fields, dimension = header.fields, len(header.data.shape)
    if dimension < 3:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {header.data.shape}",
            where=str(path),
            hint="give the whole stack of slices",
        )
    if not any(name in fields for name in ("elementspacing", "elementsize")):
        raise InputError(
            "the header has no 'ElementSpacing': the size of its voxels is not known",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    affine, notes = metaimage_affine(fields, dimension, path)
    slope, intercept = (
        numbers(fields.get(f"elementtointensityfunction{name}", default), 1, name, path)[0]
        for name, default in (("slope", "1"), ("offset", "0"))
    )
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope != 0):
        raise damaged("ElementToIntensityFunctionSlope or Offset is 0 or no number", path)
    if (slope, intercept) != (1, 0):
        notes.append(
            f"the header's ElementToIntensityFunction is applied (value = {slope:g} × number + {intercept:g}); ITK and "
            "3D Slicer ignore it"
        )
    stored, read_notes = header.data.read(path)
    array = three_dimensions(stored, path, frame)
    notes += read_notes
    kept = {"sform_code": 1, "qform_code": 1, "xyzt_units": 2}
    return StoredVolume(array, affine, slope, intercept, kept, tuple(notes), _not_ct(fields))


def read_metaimage_header(path: Path) -> MetaImageHeader:
    """Reads and checks the header; no voxel is read.

    Raises:
        InputError: A field is missing or has a value that it cannot have, or the header names too many voxels.
    """
    fields: dict[str, str] = {}
    listed: list[str] = []
    with open_regular(path) as file:
        for number in range(1, _MOST_LINES + 1):
            line = file.readline(_LONGEST_LINE).decode("utf-8", errors="replace")
            name, equals, text = line.partition("=")
            name = name.strip().lower()
            if not equals or not re.fullmatch(r"[a-z0-9_:. \-\[\]]+", name):
                if number == 1:
                    raise InputError("not a MetaImage file", where=str(path), hint="is its ending right?")
                raise damaged(f"line {number} is no field: {line[:60]!r}", path)
            if fields.get(name, text.strip()) != text.strip():
                raise damaged(f"line {number} gives {name[:40]!r} a second time, with another value", path)
            fields[name] = text.strip()
            if name == "elementdatafile":
                break
        else:
            raise damaged("it has no 'ElementDataFile'", path)
        start = file.tell()
        if fields["elementdatafile"].split()[:1] == ["LIST"]:
            listed = [row.decode("utf-8", "replace").strip() for row in file.read(1 << 24).splitlines()]
            listed = [name for name in listed if name]
    missing = [name for name in ("NDims", "DimSize", "ElementType") if name.lower() not in fields]
    if missing:
        raise damaged(f"it has no {missing[0]!r}", path)
    dimension = whole_number(fields["ndims"], 1, 10, "NDims", path)
    shape = sizes(fields["dimsize"], dimension, "DimSize", path)
    check_size(shape, where=str(path))
    channels = whole_number(fields.get("elementnumberofchannels", "1"), 1, 10**6, "ElementNumberOfChannels", path)
    kind = fields["elementtype"].upper()
    if channels != 1 or kind.endswith("_ARRAY"):
        raise InputError(f"this is not a CT of one channel, it has {channels}", where=str(path))
    if kind not in _TYPES:
        raise damaged(f"ElementType {kind[:40]!r} is not read", path)
    is_text = not _is_true(fields, "binarydata", True, path)
    is_compressed = _is_true(fields, "compresseddata", False, path)
    orders = {_is_true(fields, name, False, path) for name in _BIG_ENDIAN if name in fields}
    if len(orders) > 1:
        raise damaged(f"{' and '.join(_BIG_ENDIAN)} contradict each other", path)
    dtype = np.dtype(_TYPES[kind])
    if not is_text:
        dtype = as_stored(_TYPES[kind], True in orders, "BinaryDataByteOrderMSB", path)
    skipped = whole_number(fields.get("headersize", "0"), -1, 2**40, "HeaderSize", path)
    files = _data_files(fields["elementdatafile"], listed, path)
    encoding = "text" if is_text else "zlib" if is_compressed else "raw"
    if encoding != "raw" and skipped:
        raise damaged("'HeaderSize' with compressed data or text is not read", path)
    if not files and skipped > 0:
        raise damaged("'HeaderSize' is for data in another file; here the data follow the header", path)
    return MetaImageHeader(fields, RawData(shape, dtype, encoding, files, start, 0, skipped))


def _data_files(text: str, listed: list[str], path: Path) -> tuple[str, ...]:
    """Returns the data files of `ElementDataFile`; none where it is LOCAL."""
    words = text.split()
    if text.upper() == "LOCAL":
        return ()
    if words[:1] == ["LIST"]:
        if not 1 <= len(listed) <= MOST_FILES:
            raise damaged("its list of data files is empty or too long", path)
        return tuple(listed)
    if "%" in text and len(words) == 4:
        low, high, step = (whole_number(word, 0, MOST_FILES, "ElementDataFile", path) for word in words[1:])
        return file_pattern(words[0], low, high, step, path)
    return (text,)


def _is_true(fields: dict[str, str], name: str, default: bool, path: Path) -> bool:
    """Reads a field that is true or false.

    Raises:
        InputError: It is something else.
    """
    word = fields.get(name, str(default)).lower()
    if word not in _TRUE and word not in _FALSE:
        raise damaged(f"{name!r} is True or False, here it is {word[:30]!r}", path)
    return word in _TRUE


def _not_ct(fields: dict[str, str]) -> str | None:
    """Returns what the header says that the file is, where that is no CT; None otherwise."""
    kind = fields.get("objecttype", "Image")
    if kind.lower() not in ("", "image"):
        return f"a MetaIO object of type {kind[:30]}"
    return modality_not_ct(fields.get("modality", ""))
