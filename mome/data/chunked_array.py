"""A volume on disk as compressed chunks, from which a patch is read without the rest.

A file holds the chunks one after the other, each compressed by zstd in Blosc2. A table beside it says where each chunk
lies and which checksum it has. Blosc2 sees single buffers only: its own file format can hold
expressions, which a reader evaluates.
"""

from __future__ import annotations

import itertools
import math
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
    # A shuffle of the bytes of single-byte voxels compresses less, and is slower.
    shuffle = blosc2.Filter.NOFILTER if array.itemsize == 1 else blosc2.Filter.SHUFFLE
    rows, offset = [], 0
    with path.open("wb") as file:
        for box in _boxes(array.shape):
            chunk = np.ascontiguousarray(array[box])
            packed = blosc2.compress2(
                chunk, codec=blosc2.Codec.ZSTD, clevel=_LEVEL, filters=[shuffle], typesize=array.itemsize, nthreads=1
            )
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
        # Lists of Python numbers: a patch looks up dozens of chunks.
        self._begins = table[:, 0].tolist()
        self._ends = (table[:, 0] + table[:, 1]).tolist()
        self._sums = table[:, 2].tolist()

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
        # For every axis: number of a chunk, its voxels, the part of them that is read, and its place in the box.
        pieces = [
            [_piece(n, a, b, size) for n in range(a // CHUNK_SIDE, -(-b // CHUNK_SIDE))]
            for a, b, size in zip(low, high, self.shape, strict=True)
        ]
        try:
            with open(self.path, "rb", buffering=0) as file:
                for i, depth, read_i, write_i in pieces[0]:
                    for j, height, read_j, write_j in pieces[1]:
                        # The chunks along the last axis lie one after the other in the file.
                        row = (i * self._counts[1] + j) * self._counts[2]
                        numbers = range(row + pieces[2][0][0], row + pieces[2][-1][0] + 1)
                        start = self._begins[numbers[0]]
                        packed = os.pread(file.fileno(), self._ends[numbers[-1]] - start, start)
                        for number, (_, width, read_k, write_k) in zip(numbers, pieces[2], strict=True):
                            begin, end = self._begins[number] - start, self._ends[number] - start
                            chunk = self._chunk(packed[begin:end], number, (depth, height, width))
                            out[write_i, write_j, write_k] = chunk[read_i, read_j, read_k]
        except OSError as error:
            raise InputError(f"a file of a training cache cannot be read: {error}", where=str(self.path)) from error
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[tuple(slice(0, side) for side in self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def _chunk(self, packed: bytes, number: int, sides: tuple[int, int, int]) -> np.ndarray:
        """Returns one chunk from its compressed bytes.

        Raises:
            InputError: It is damaged.
        """
        if len(packed) == self._ends[number] - self._begins[number] and zlib.crc32(packed) == self._sums[number]:
            try:
                raw = self._blosc2.decompress2(packed, nthreads=1)
            except (RuntimeError, ValueError, TypeError):
                raw = b""
            if len(raw) == math.prod(sides) * self.dtype.itemsize:
                return np.frombuffer(raw, dtype=self.dtype).reshape(sides)
        raise InputError(
            "a file of a training cache has changed",
            where=str(self.path),
            hint="remove its folder; the next run builds it again",
        )


def _piece(number: int, low: int, high: int, size: int) -> tuple[int, int, slice, slice]:
    """Returns, of a chunk along one axis: its number, its voxels, those between `low` and `high`, and their place."""
    begin = number * CHUNK_SIDE
    end = min(begin + CHUNK_SIDE, size)
    first, last = max(begin, low), min(end, high)
    return number, end - begin, slice(first - begin, last - begin), slice(first - low, last - low)


def _boxes(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the boxes of all chunks in C order."""
    starts = [range(0, side, CHUNK_SIDE) for side in shape]
    for first in itertools.product(*starts):
        yield tuple(slice(a, min(a + CHUNK_SIDE, side)) for a, side in zip(first, shape, strict=True))
