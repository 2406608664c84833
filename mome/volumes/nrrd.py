"""Reads NRRD files. Source: the definition of the format at teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import math
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
    header_lines,
    numbers,
    sizes,
    spatial_affine,
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
# The signs that turn a space into RAS.
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
_MM = {"mm": 1.0, "m": 1000.0, "cm": 10.0, "um": 0.001, "micron": 0.001}
_COLOURS = ("rgb-color", "rgba-color", "hsv-color", "xyz-color", "3-color", "4-color", "complex", "quaternion")


@dataclass(frozen=True)
class NrrdHeader:
    """The content of the header of a NRRD file.

    Attributes:
        fields: Field, in lower case → its text.
        data: Where the voxels are.
    """

    fields: dict[str, str]
    data: RawData


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
    affine, notes = _affine(header, spatial, directions, path)
    array = header.data.read(path).transpose(*spatial, *others)
    # Axes of one voxel that are none of space carry nothing.
    array = array.reshape(*array.shape[:3], *(n for n in array.shape[3:] if n > 1))
    array = three_dimensions(array, path, frame)
    return StoredVolume(array, affine, header={"sform_code": 1, "qform_code": 1, "xyzt_units": 2}, notes=tuple(notes))


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
    fields, listed = _fields(lines[1:], path)
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
    return NrrdHeader(fields, RawData(shape, dtype, encoding, files, start, lines_skipped, skipped))


def _fields(lines: list[str], path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the fields of a header, and the file names that follow `data file: LIST`."""
    fields: dict[str, str] = {}
    for number, line in enumerate(lines):
        if line.startswith("#") or re.match(r"[^:]*:=", line):
            continue  # a comment, or a key of another program
        name, colon, text = line.partition(":")
        name = name.strip().lower()
        if not colon or name in fields:
            raise damaged(f"line {number + 2} is no field, or a second one: {line[:60]!r}", path)
        fields[name] = text.strip()
        if name in ("data file", "datafile") and text.split()[:1] == ["LIST"]:
            names = tuple(line.strip() for line in lines[number + 1 :])
            if not 1 <= len(names) <= MOST_FILES:
                raise damaged("its list of data files is empty or too long", path)
            return fields, names
    return fields, ()


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


def _vectors(text: str) -> list[list[float] | None] | None:
    """Returns the vectors of a field such as `(1,0,0) none (0,1,0)`; None where the text is something else."""
    found: list[list[float] | None] = []
    for match in re.finditer(r"\s*(?:\(([^()]{0,400})\)|(none))\s*|(.)", text):
        inside, none, other = match.groups()
        if other is not None:
            return None
        try:
            found.append(None if none else [float(word) for word in inside.split(",")])
        except ValueError:
            return None
    return found


def _spatial_axes(header: NrrdHeader, path: Path) -> tuple[list[int], list[list[float] | None] | None]:
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
        directions = _vectors(fields["space directions"])
        if directions is None or len(directions) != dimension:
            raise damaged(f"'space directions' has {dimension} vectors, here it is not so", path)
        spatial = [axis for axis, vector in enumerate(directions) if vector is not None]
        # A space with time has a direction in time as its fourth.
        spatial = spatial[:3] if len(spatial) == 4 else spatial
    elif kinds:
        spatial = [axis for axis, kind in enumerate(kinds) if kind in ("domain", "space", "???", "none")]
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


def _affine(
    header: NrrdHeader, spatial: list[int], directions: list[list[float] | None] | None, path: Path
) -> tuple[np.ndarray, list[str]]:
    """Returns the affine to RAS mm, and notes on what the header leaves open."""
    fields, notes = header.fields, []
    dimension = len(header.data.shape)
    space = re.sub(r"(-time|(?<=^...)t)$", "", fields.get("space", "").lower())
    signs = _SPACES.get(space)
    if signs is None:
        named = f"names the unknown space {fields['space'][:30]!r}" if "space" in fields else "names no space"
        notes.append(f"the header {named}: left-posterior-superior is assumed, left and right may be exchanged")
        signs = _SPACES["lps"]
    if directions is not None:
        columns = [(directions[axis] or [])[:3] for axis in spatial]
        if any(len(column) != 3 for column in columns):
            raise damaged("'space directions' are no vectors of three numbers", path)
        origin = (_vectors(fields.get("space origin", "(0,0,0)")) or [None])[0]
        if origin is None or len(origin) < 3:
            raise damaged("'space origin' is no vector of three numbers", path)
        origin = origin[:3]
        if "space origin" not in fields:
            notes.append("the header has no 'space origin': the first voxel is taken as the origin")
    else:
        spacings = _per_axis(fields, ("spacings",), dimension, path)
        lowest = _per_axis(fields, ("axis mins", "axismins"), dimension, path)
        if spacings is None or not all(math.isfinite(spacings[axis]) for axis in spatial):
            raise InputError(
                "the header has neither 'space directions' nor 'spacings': the size of its voxels is not known",
                where=str(path),
                hint="convert the scan again from its DICOM series",
            )
        columns = [
            [abs(spacings[axis]) if row == place else 0.0 for row in range(3)] for place, axis in enumerate(spatial)
        ]
        origin = [0.0, 0.0, 0.0]
        if lowest is not None and all(math.isfinite(lowest[axis]) for axis in spatial):
            # "axis mins" are outer faces; ITK reads them so where 'centers' does not say otherwise.
            origin = [lowest[axis] + abs(spacings[axis]) / 2 for axis in spatial]
        notes.append("the header gives no directions: its axes are taken as those of its space")
    affine = spatial_affine(columns, origin, signs)
    affine[:3] *= _unit(fields, notes)
    return affine, notes


def _per_axis(fields: dict[str, str], names: tuple[str, ...], dimension: int, path: Path) -> list[float] | None:
    """Returns the numbers of a field with one number per axis; None where there is no such field."""
    name = next((name for name in names if name in fields), None)
    return None if name is None else numbers(fields[name], dimension, name, path)


def _unit(fields: dict[str, str], notes: list[str]) -> float:
    """Returns the unit of space in mm. A note is added where it is not mm."""
    units = {unit.strip().lower() for unit in re.findall(r'"([^"]*)"', fields.get("space units", ""))} - {""}
    if not units or units == {"mm"}:
        return 1.0
    scale = _MM.get(next(iter(units))) if len(units) == 1 else None
    if scale is None:
        notes.append(f"the header's units {', '.join(sorted(units))[:40]!r} are not known; mm is assumed")
        return 1.0
    notes.append(f"the header's unit is {next(iter(units))!r}; it is converted to mm")
    return scale
