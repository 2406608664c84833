"""Reads NRRD files. Source: the definition of the format at teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mome.errors import InputError
from mome.volumes.not_ct import nrrd_not_ct
from mome.volumes.nrrd_geometry import Vectors, nrrd_affine, vectors
from mome.volumes.open_file import open_regular
from mome.volumes.raw_data import (
    MOST_FILES,
    RawData,
    as_stored,
    damaged,
    file_pattern,
    header_lines,
    sizes,
    whole_number,
)
from mome.volumes.sizes import check_size
from mome.volumes.stored import StoredVolume, three_dimensions

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPE_OF = {name: dtype for dtype, names in _TYPES.items() for name in names}
_ENCODINGS = {
    "raw": "raw", "gz": "zlib", "gzip": "zlib", "bz2": "bzip2", "bzip2": "bzip2",
    "txt": "text", "text": "text", "ascii": "text", "hex": "hex",
}  # fmt: skip
_SPATIAL_KINDS = ("domain", "space", "???", "none")
_COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color", "complex", "quaternion")


@dataclass(frozen=True)
class NrrdHeader:
    """The content of the header of a NRRD file.

    Attributes:
        fields: Field, in lower case → its text.
        data: Where the voxels are.
        keys: Key of another program, in lower case → its value.
    """

    fields: dict[str, str]
    data: RawData
    keys: dict[str, str]


def read_nrrd(path: Path, frame: int | None = None) -> StoredVolume:
    """Reads a `.nrrd` or `.nhdr` file.

    Args:
        path: The file.
        frame: The volume to take along the axis that is none of space; see `mome.volumes.read.read_volume`.

    Raises:
        InputError: A field is missing or damaged, the file holds colours, or its data are elsewhere or too short.
        EOFError, OSError, ValueError, zlib.error: The data are damaged.
    """
    header = read_nrrd_header(path)
    spatial, directions = _spatial_axes(header, path)
    others = [axis for axis in range(len(header.data.shape)) if axis not in spatial]
    shape = header.data.shape
    affine, notes = nrrd_affine(header.fields, len(shape), spatial, directions, path)
    kinds = header.fields.get("kinds", "").lower().split()
    not_ct = nrrd_not_ct([kinds[axis] for axis in others if kinds and shape[axis] > 1], header.keys)
    stored, read_notes = header.data.read(path)
    notes += _value_notes(header.fields) + read_notes
    array = stored.transpose(*spatial, *others)
    # Axes of one voxel that are none of space carry nothing.
    array = array.reshape(*array.shape[:3], *(n for n in array.shape[3:] if n > 1))
    array = three_dimensions(array, path, frame)
    kept = {"sform_code": 1, "qform_code": 1, "xyzt_units": 2}
    return StoredVolume(array, affine, header=kept, notes=tuple(notes), not_ct=not_ct)


def read_nrrd_header(path: Path) -> NrrdHeader:
    """Reads and checks the header; no voxel is read.

    Raises:
        InputError: A field is missing or has a value that it cannot have, or the header names too many voxels.
    """
    with open_regular(path) as file:
        lines = header_lines(file, path)
        start = file.tell()
    if not lines or not re.fullmatch(r"NRRD000\d", lines[0].strip()):
        raise InputError("not a NRRD file", where=str(path), hint="is its ending right?")
    fields, keys, listed = _fields(lines[1:], path)
    missing = [name for name in ("dimension", "sizes", "type", "encoding") if name not in fields]
    if missing:
        raise damaged(f"it has no {missing[0]!r}", path)
    dimension = whole_number(fields["dimension"], 1, 16, "dimension", path)
    shape = sizes(fields["sizes"], dimension, "sizes", path)
    check_size(shape, where=str(path))
    kind, encoding = fields["type"].lower(), _ENCODINGS.get(fields["encoding"].lower())
    if kind not in _TYPE_OF or encoding is None:
        raise damaged(f"type {fields['type'][:30]!r} with encoding {fields['encoding'][:30]!r} is not read", path)
    big = {"big": True, "little": False}.get(fields.get("endian", "").lower())
    is_text = encoding == "text"
    dtype = np.dtype(_TYPE_OF[kind]) if is_text else as_stored(_TYPE_OF[kind], big, "endian", path)
    lines_skipped = whole_number(fields.get("line skip", fields.get("lineskip", "0")), 0, 10**6, "line skip", path)
    lowest = -1 if encoding == "raw" else 0
    skipped = whole_number(fields.get("byte skip", fields.get("byteskip", "0")), lowest, 2**40, "byte skip", path)
    files = listed or _data_files(fields, path)
    if encoding in ("text", "hex") and skipped:
        raise damaged("'byte skip' with data that are text is not read", path)
    return NrrdHeader(fields, RawData(shape, dtype, encoding, files, start, lines_skipped, skipped), keys)


def _fields(lines: list[str], path: Path) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Returns the fields, the keys of other programs, and the file names after `data file: LIST`."""
    fields: dict[str, str] = {}
    keys: dict[str, str] = {}
    for number, line in enumerate(lines):
        if line.startswith("#"):
            continue
        if re.match(r"[^:]*:=", line):
            key, _, value = line.partition(":=")
            keys[key.strip().lower()] = value.strip()
            continue
        name, colon, text = line.partition(":")
        name = name.strip().lower()
        if not colon or name in fields:
            raise damaged(f"line {number + 2} is no field, or a second one: {line[:60]!r}", path)
        fields[name] = text.strip()
        if name in ("data file", "datafile") and text.split()[:1] == ["LIST"]:
            names = tuple(line.strip() for line in lines[number + 1 :])
            if not 1 <= len(names) <= MOST_FILES:
                raise damaged("its list of data files is empty or too long", path)
            return fields, keys, names
    return fields, keys, ()


def _data_files(fields: dict[str, str], path: Path) -> tuple[str, ...]:
    """Returns the data files of a field `data file`: none, a name, or a pattern with its range."""
    text = fields.get("data file", fields.get("datafile"))
    if text is None:
        if path.name.lower().endswith(".nhdr"):
            raise damaged("it has no 'data file'", path)
        return ()
    words = text.split()
    if "%" in text and len(words) in (4, 5):
        low, high, step = (whole_number(word, 0, MOST_FILES, "data file", path) for word in words[1:4])
        return file_pattern(words[0], low, high, step, path)
    return (text,)


def _spatial_axes(header: NrrdHeader, path: Path) -> tuple[list[int], Vectors | None]:
    """Returns the three axes of space, and the direction of every axis where the header has them."""
    fields, dimension = header.fields, len(header.data.shape)
    kinds = [word.lower() for word in fields.get("kinds", "").split()]
    if kinds and len(kinds) != dimension:
        raise damaged(f"'kinds' has {len(kinds)} words for {dimension} axes", path)
    colour = next((kind for kind in kinds if kind in _COLOURS), None)
    if colour:
        raise InputError(f"this is not a CT of one channel, its kind is {colour}", where=str(path))
    directions = None
    if "space directions" in fields:
        directions = vectors(fields["space directions"])
        if directions is None or len(directions) != dimension:
            raise damaged(f"'space directions' has {dimension} vectors, here it is not so", path)
        spatial = [axis for axis, vector in enumerate(directions) if vector is not None]
        # A space with time has a direction in time as its fourth.
        spatial = spatial[:3] if len(spatial) == 4 else spatial
        other = next((kinds[axis] for axis in spatial if kinds and kinds[axis] not in _SPATIAL_KINDS), None)
        if other:
            raise damaged(f"'space directions' gives a direction to an axis of kind {other[:30]!r}", path)
    elif kinds:
        spatial = [axis for axis, kind in enumerate(kinds) if kind in _SPATIAL_KINDS]
        spatial = spatial[:3] if len(spatial) > 3 else spatial
    else:
        spatial = list(range(min(3, dimension)))
    if len(spatial) != 3:
        raise InputError(
            f"a CT is a volume of three dimensions, this has shape {header.data.shape} "
            f"with {len(spatial)} axes of space",
            where=str(path),
            hint="give the whole stack of slices",
        )
    return spatial, directions


def _value_notes(fields: dict[str, str]) -> list[str]:
    """Returns notes on fields that say that numbers are not HU."""
    notes = []
    unit = fields.get("sample units", fields.get("sampleunits", "")).strip('" ').lower()
    if unit not in ("", "hu", "hounsfield", "hounsfield unit", "hounsfield units"):
        notes.append(f"the header's 'sample units' are {unit[:30]!r}: are the values HU?")
    limits = [fields.get(name, fields.get(name.replace(" ", ""), "")) for name in ("old min", "old max")]
    if any(word.lower() not in ("", "nan") for word in limits):
        notes.append(
            "the header says that its numbers stand for values from {} to {} ('old min', 'old max'); they are taken as "
            "they are stored".format(*(word[:20] or "?" for word in limits))
        )
    return notes
