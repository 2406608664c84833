"""A volume on disk as compressed chunks, from which a patch is read without the rest.

A file holds the chunks one after the other, each compressed by Blosc2 (zstd after a bit shuffle). A table beside it
says where each chunk lies and which checksum it has. Blosc2 sees single buffers only: its own file format can hold
expressions, which a reader evaluates.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mome.errors import InputError

# A patch of 64³ voxels lies in at most 27 chunks of this side, which hold 3.4 times its voxels. Our choice.
CHUNK_SIDE = 32
_LEVEL = 5  # of zstd


def load_blosc2() -> Any:
    """Returns the package `blosc2`.

    Raises:
        InputError: It is not installed.
    """
    try:
        import blosc2
    except ImportError as error:
        raise InputError(
            "cache_format=blosc2 needs the package blosc2, which is not installed", hint="pip install 'mome[cache]'"
        ) from error
    return blosc2


def write_chunks(array: np.ndarray, path: Path) -> np.ndarray:
    """Writes an array as compressed chunks.

    Args:
        array: (D, H, W), uint8 or uint16.
        path: The file.

    Returns:
        The table, int64 (chunks, 3): offset and length in bytes, and CRC-32 of the compressed bytes, in C order.

    Raises:
        InputError: Blosc2 is not installed.
    """
    blosc2 = load_blosc2()
    rows, offset = [], 0
    with path.open("wb") as file:
        for box in _boxes(array.shape):
            chunk = np.ascontiguousarray(array[box])
            packed = blosc2.compress2(
                chunk, codec=blosc2.Codec.ZSTD, clevel=_LEVEL, filters=[blosc2.Filter.BITSHUFFLE],
                typesize=array.itemsize, nthreads=1,
            )  # fmt: skip
            file.write(packed)
            rows.append((offset, len(packed), zlib.crc32(packed)))
            offset += len(packed)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


class ChunkedArray:
    """A read-only array (D, H, W) of compressed chunks.

    `array[slices]` reads a box; the checksum of each chunk is compared each time it is read. `np.asarray` reads all.

    Args:
        path: The file of chunks.
        table: What `write_chunks` returned.
        shape: (D, H, W).
        dtype: uint8 or uint16.

    Raises:
        InputError: Blosc2 is not installed, or the table is of another shape of array.
    """

    def __init__(self, path: Path, table: np.ndarray, shape: Sequence[int], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self._blosc2 = load_blosc2()
        self._counts = [-(-side // CHUNK_SIDE) for side in self.shape]
        if table.dtype != np.int64 or table.shape != (int(np.prod(self._counts)), 3):
            raise InputError("the table of chunks is of another array", where=str(path))
        self._table = table

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        """Reads a box.

        Args:
            box: Three slices with a step of 1; they may be empty.

        Raises:
            InputError: A chunk is damaged, or the file is missing.
        """
        low, high = zip(*(side.indices(size)[:2] for side, size in zip(box, self.shape, strict=True)), strict=True)
        out = np.zeros([max(stop - start, 0) for start, stop in zip(low, high, strict=True)], dtype=self.dtype)
        if not out.size:
            return out
        try:
            with open(self.path, "rb", buffering=0) as file:
                for number in itertools.product(*map(_chunks, low, high)):
                    begin = [n * CHUNK_SIDE for n in number]
                    chunk = self._chunk(file.fileno(), number)
                    first = [max(a, b) for a, b in zip(begin, low, strict=True)]
                    last = [min(a + n, b) for a, n, b in zip(begin, chunk.shape, high, strict=True)]
                    inside = tuple(slice(f - a, e - a) for f, e, a in zip(first, last, begin, strict=True))
                    out[tuple(slice(f - a, e - a) for f, e, a in zip(first, last, low, strict=True))] = chunk[inside]
        except OSError as error:
            raise InputError(f"a file of a training cache cannot be read: {error}", where=str(self.path)) from error
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[tuple(slice(0, side) for side in self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _chunk(self, file: int, number: tuple[int, ...]) -> np.ndarray:
        """Returns one chunk.

        Raises:
            InputError: It is damaged.
        """
        offset, length, crc = self._table[np.ravel_multi_index(number, self._counts)].tolist()
        sides = [min(CHUNK_SIDE, size - n * CHUNK_SIDE) for n, size in zip(number, self.shape, strict=True)]
        packed = os.pread(file, length, offset)
        if len(packed) == length and zlib.crc32(packed) == crc:
            try:
                raw = self._blosc2.decompress2(packed, nthreads=1)
            except (RuntimeError, ValueError, TypeError):
                raw = b""
            if len(raw) == int(np.prod(sides)) * self.dtype.itemsize:
                return np.frombuffer(raw, dtype=self.dtype).reshape(sides)
        raise InputError(
            "a file of a training cache has changed",
            where=str(self.path),
            hint="remove its folder; the next run builds it again",
        )


def _chunks(low: int, high: int) -> range:
    """Returns the numbers of the chunks along one axis that hold voxels from `low` to below `high`."""
    return range(low // CHUNK_SIDE, -(-high // CHUNK_SIDE))


def _boxes(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the boxes of all chunks in C order."""
    starts = [range(0, side, CHUNK_SIDE) for side in shape]
    for first in itertools.product(*starts):
        yield tuple(slice(a, min(a + CHUNK_SIDE, side)) for a, side in zip(first, shape, strict=True))
