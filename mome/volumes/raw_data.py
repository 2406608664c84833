"""Reads the voxels of NRRD and MetaImage files, which follow the header or lie in data files beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mome.errors import InputError
from mome.volumes.open_file import beside, open_regular
from mome.volumes.streams import count_rest, decompressed, most_bytes, read_exactly, skip

_LONGEST_HEADER = 1 << 20
# Data of one file per slice; a CT has fewer slices.
MOST_FILES = 100_000


@dataclass(frozen=True)
class RawData:
    """Where voxels are stored, and how.

    Attributes:
        shape: Voxels along all axes; the first one changes fastest.
        dtype: The type of the numbers, with its byte order.
        encoding: `raw`, `zlib` (which includes gzip), `bzip2`, `text` or `hex`.
        files: Names of the data files in the header's folder; empty where the voxels follow the header.
        start: Byte after the header, where the voxels begin if there are no data files.
        skip_lines: Lines to skip in every file before decompression.
        skip_bytes: Bytes to skip after decompression; −1 where the voxels are the last bytes of the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    encoding: str
    files: tuple[str, ...] = ()
    start: int = 0
    skip_lines: int = 0
    skip_bytes: int = 0

    def paths(self, header: Path) -> list[Path]:
        """Returns the data files of a header file; the header itself where the voxels follow it.

        Raises:
            InputError: A data file lies outside the header's folder.
        """
        return [beside(header, name) for name in self.files] or [header]

    def read(self, header: Path) -> tuple[np.ndarray, list[str]]:
        """Returns the numbers as an array of `shape`, and a note where the files hold more than them.

        Raises:
            InputError: A data file is missing, lies elsewhere, or is shorter than the header says.
            EOFError, OSError, ValueError, zlib.error: The data are damaged.
        """
        paths = self.paths(header)
        if len(set(paths)) < len(paths):
            raise InputError("the header names a data file twice", where=str(header), hint="name one file per slice")
        count, remainder = divmod(math.prod(self.shape), len(paths))
        if remainder:
            raise InputError(
                f"the header names {len(paths)} data files, which cannot share its voxels evenly", where=str(header)
            )
        read = [self._read_file(path, count, 0 if self.files else self.start) for path in paths]
        parts, rest = [part for part, _ in read], sum(rest for _, rest in read)
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        notes = [f"{rest:,} bytes after the voxels are not read"] if rest else []
        return whole.reshape(self.shape, order="F"), notes

    def _read_file(self, path: Path, count: int, start: int) -> tuple[np.ndarray, int]:
        """Reads `count` numbers of one file, from byte `start` on, and counts the bytes that follow."""
        needed = count * self.dtype.itemsize
        with open_regular(path) as file:
            size = path.stat().st_size
            file.seek(start)
            for _ in range(self.skip_lines):
                if not file.readline(_LONGEST_HEADER):
                    raise EOFError("the file ends before its voxels")
            if self.encoding in ("text", "hex"):
                return self._read_text(file, count, path)
            if needed > most_bytes(size - file.tell(), self.encoding):
                raise InputError(
                    f"the file is truncated or damaged: its header names {needed:,} bytes of voxels, "
                    f"{size - file.tell():,} bytes cannot hold them",
                    where=str(path),
                    hint="copy or download it again",
                )
            if self.skip_bytes < 0:
                file.seek(size - needed)
            stream = decompressed(file, self.encoding)
            skip(stream, max(0, self.skip_bytes))
            stored = read_exactly(stream, needed)
            # The checksum of a compressed stream stands at its end.
            rest = size - file.tell() if self.encoding == "raw" else count_rest(stream, needed + _LONGEST_HEADER)
        return stored.view(self.dtype), rest

    def _read_text(self, file: BinaryIO, count: int, path: Path) -> tuple[np.ndarray, int]:
        """Reads numbers that are written as text, and counts the bytes of the numbers that follow."""
        data = file.read(64 * (count + 1))
        if self.encoding == "hex":
            every = np.frombuffer(bytes.fromhex(data.decode("ascii")), dtype=self.dtype)
            return every[:count], max(0, every.size - count) * self.dtype.itemsize
        words = data.split()
        if len(words) < count:
            raise InputError(
                f"the file is truncated or damaged: its header names {count:,} numbers, it holds {len(words):,}",
                where=str(path),
                hint="copy or download it again",
            )
        rest = sum(len(word) + 1 for word in words[count:])
        return np.array(words[:count], dtype=np.float64).astype(self.dtype), rest


def header_lines(file: BinaryIO, path: Path) -> list[str]:
    """Returns the lines of a text header, which ends at an empty line or with the file.

    The file then stands at the byte after the header.

    Raises:
        InputError: The header is longer than 1 MiB.
    """
    lines: list[str] = []
    length = 0
    while True:
        line = file.readline(_LONGEST_HEADER)
        length += len(line)
        if length >= _LONGEST_HEADER:
            raise InputError("the header is longer than 1 MiB: it is damaged", where=str(path), hint="copy it again")
        text = line.decode("utf-8", errors="replace").rstrip("\r\n")
        if not text:
            return lines
        lines.append(text)


def numbers(text: str, count: int, field: str, path: Path) -> list[float]:
    """Reads `count` numbers that are separated by spaces.

    Raises:
        InputError: There are more or fewer, or one is no number.
    """
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count:
        raise damaged(f"{field!r} has {count} numbers, here it is {text[:60]!r}", path)
    return values


def whole_number(text: str, low: int, high: int, field: str, path: Path) -> int:
    """Reads a whole number from `low` to `high`.

    Raises:
        InputError: The text is something else.
    """
    word = text.strip()
    if len(word) <= 20 and word.lstrip("+-").isdecimal() and word.isascii() and low <= int(word) <= high:
        return int(word)
    raise damaged(f"{field!r} is a whole number from {low} to {high}, here it is {word[:60]!r}", path)


def sizes(text: str, count: int, field: str, path: Path) -> tuple[int, ...]:
    """Reads `count` whole numbers above 0.

    Raises:
        InputError: There are more or fewer, or one is something else.
    """
    words = text.split()
    if len(words) != count:
        raise damaged(f"{field!r} has {count} numbers, here it is {text[:60]!r}", path)
    return tuple(whole_number(word, 1, 2**40, field, path) for word in words)


def damaged(what: str, path: Path) -> InputError:
    """Returns an error for a header that a field makes unreadable."""
    return InputError(f"the header is damaged: {what}", where=str(path), hint="write the scan again, as .nii.gz")


def file_pattern(pattern: str, low: int, high: int, step: int, path: Path) -> tuple[str, ...]:
    """Returns the names that a pattern such as `slice%03d.raw` stands for, from `low` to `high`.

    Raises:
        InputError: The pattern has not one number, or there are too many files.
    """
    before, sign, after = pattern.partition("%")
    digits, kind, after = after.partition("d")
    count = (high - low) // step + 1 if step else 0
    plain = digits.isdecimal() and len(digits) <= 2 or not digits
    if not sign or not kind or not plain or "%" in after or not 1 <= count <= MOST_FILES:
        raise damaged(f"{pattern[:60]!r} names no series of data files", path)
    width = int(digits or 0)
    fill = "0" if digits.startswith("0") else " "
    return tuple(before + str(number).rjust(width, fill) + after for number in range(low, low + count * step, step))


def as_stored(dtype: str, big_endian: bool | None, field: str, path: Path) -> np.dtype:
    """Returns a type with its byte order.

    Args:
        dtype: As in "i2".
        big_endian: None where the header does not say.
        field: The field that would say.
        path: The file that errors name.

    Raises:
        InputError: The byte order is needed and not known.
    """
    plain = np.dtype(dtype)
    if big_endian is None and plain.itemsize > 1:
        raise damaged(f"it has no {field!r}, so the byte order is not known", path)
    return plain.newbyteorder(">" if big_endian else "<")


def spatial_affine(columns: Sequence[Sequence[float]], origin: Sequence[float], signs: Sequence[float]) -> np.ndarray:
    """Returns the affine to RAS mm.

    Args:
        columns: The step of every array axis in the file's world, in mm.
        origin: The centre of the first voxel there, in mm.
        signs: −1 for a world axis that runs against RAS.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns, dtype=np.float64).T
    affine[:3, 3] = origin
    return np.diag([*signs, 1.0]) @ affine
