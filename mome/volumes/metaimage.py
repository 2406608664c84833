"""Reads MetaImage files. Source: the format's documentation at itk.org/Wiki/MetaIO/Documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.open_file import open_regular
from mome.volumes.raw_data import (
    MOST_FILES,
    RawData,
    as_stored,
    damaged,
    file_pattern,
    numbers,
    sizes,
    spatial_affine,
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
_MATRIX = ("transformmatrix", "rotation", "orientation")
_ORIGIN = ("offset", "position", "origin")
_SPACING = ("elementspacing", "elementsize")
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
    notes = []
    if dimension < 3:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {header.data.shape}",
            where=str(path),
            hint="give the whole stack of slices",
        )
    spacing, origin, matrix = (_first(fields, names) for names in (_SPACING, _ORIGIN, _MATRIX))
    if spacing is None:
        raise InputError(
            "the header has no 'ElementSpacing': the size of its voxels is not known",
            where=str(path),
            hint="convert the scan again from its DICOM series",
        )
    steps = numbers(spacing, dimension, "ElementSpacing", path)
    if matrix is None:
        notes.append("the header gives no directions: left-posterior-superior is assumed")
    directions = (
        np.eye(dimension) if matrix is None else np.array(numbers(matrix, dimension**2, "TransformMatrix", path))
    )
    # A row is the direction of an array axis.
    columns = (directions.reshape(dimension, dimension) * np.abs(steps)[:, None])[:3, :3]
    start = [0.0] * 3 if origin is None else numbers(origin, dimension, "Offset", path)[:3]
    affine = spatial_affine(columns.tolist(), start, (-1, -1, 1))  # MetaImage's world is LPS
    slope, intercept = (
        numbers(fields.get(f"elementtointensityfunction{name}", default), 1, name, path)[0]
        for name, default in (("slope", "1"), ("offset", "0"))
    )
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope != 0):
        raise damaged("ElementToIntensityFunctionSlope or Offset is 0 or no number", path)
    array = three_dimensions(header.data.read(path), path, frame)
    kept = {"sform_code": 1, "qform_code": 1, "xyzt_units": 2}
    return StoredVolume(array, affine, slope, intercept, kept, tuple(notes))


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
    is_text = not _is_true(fields.get("binarydata", "True"))
    is_compressed = _is_true(fields.get("compresseddata", "False"))
    big = _first(fields, _BIG_ENDIAN)
    dtype = np.dtype(_TYPES[kind])
    if not is_text:
        dtype = as_stored(_TYPES[kind], _is_true(big or "False"), "BinaryDataByteOrderMSB", path)
    skipped = whole_number(fields.get("headersize", "0"), -1, 2**40, "HeaderSize", path)
    files = _data_files(fields["elementdatafile"], listed, path)
    encoding = "text" if is_text else "zlib" if is_compressed else "raw"
    if encoding != "raw" and skipped:
        raise damaged("'HeaderSize' with compressed data or text is not read", path)
    return MetaImageHeader(fields, RawData(shape, dtype, encoding, files, start, 0, skipped if files else 0))


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


def _first(fields: dict[str, str], names: tuple[str, ...]) -> str | None:
    """Returns the text of the first field there is."""
    return next((fields[name] for name in names if name in fields), None)


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "t", "1", "yes")
