"""Reads bytes that may be compressed. A compressed stream is read to its end, because its checksum stands there."""

from __future__ import annotations

import bz2
import zlib
from typing import BinaryIO, Protocol

import numpy as np

_CHUNK = 1 << 20
# Deflate makes data at most 1,032 times smaller (zlib's technical details); gzip's and zlib's frames need a few bytes.
_LARGEST_RATIO = 1_040
GZIP_MAGIC = b"\x1f\x8b"


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes, none at the end."""
        ...


class ZlibReader:
    """Decompresses gzip and zlib data of one or several members; checksums are tested at the end of each.

    `read` raises `zlib.error` for damaged data and `EOFError` for data that end early.

    Args:
        file: The compressed bytes, from its current position.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._start(b"")
        self._ended = False

    def _start(self, data: bytes) -> None:
        self._decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS + 32)  # 32: the format is recognised by its header
        self._pending = data

    def read(self, size: int, /) -> bytes:
        """Returns `size` bytes, fewer only at the end of the data."""
        parts: list[bytes] = []
        while size > 0 and not self._ended:
            data = self._pending or self._file.read(_CHUNK)
            part = self._decoder.decompress(data, min(size, _CHUNK))
            self._pending = self._decoder.unconsumed_tail
            if part:
                parts.append(part)
                size -= len(part)
            if self._decoder.eof:
                self._next_member()
            elif not data and not part:
                raise EOFError("the compressed data end early")
        return b"".join(parts)

    def _next_member(self) -> None:
        """Starts the member that follows; zero bytes between members are padding."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest:
            data = self._file.read(_CHUNK)
            if not data:
                self._ended = True
                return
            rest = data.lstrip(b"\0")
        self._start(rest)


def decompressed(file: BinaryIO, encoding: str) -> Readable:
    """Returns the stream of the bytes of a file after decompression.

    Args:
        file: The file, at the position where the data begin.
        encoding: `raw`, `zlib` (which includes gzip) or `bzip2`.
    """
    if encoding == "zlib":
        return ZlibReader(file)
    return bz2.BZ2File(file) if encoding == "bzip2" else file


def most_bytes(stored: int, encoding: str) -> float:
    """Returns the largest number of bytes that `stored` bytes of a file can stand for.

    A header that names more is wrong, which is known before anything is allocated.
    """
    return {"raw": stored, "zlib": stored * _LARGEST_RATIO}.get(encoding, float("inf"))


def read_exactly(stream: Readable, count: int) -> np.ndarray:
    """Returns `count` bytes as uint8.

    Memory is touched only as data arrive, so that a stream that ends early costs what it holds.

    Raises:
        EOFError: The stream ends early.
    """
    buffer = np.empty(count, dtype=np.uint8)
    view, at = buffer.data, 0
    while at < count:
        part = stream.read(min(_CHUNK, count - at))
        if not part:
            raise EOFError(f"the header names {count:,} bytes of voxels, the file holds {at:,}")
        view[at : at + len(part)] = part
        at += len(part)
    return buffer


def count_rest(stream: Readable, limit: int) -> int:
    """Reads a stream to its end, or until `limit` bytes have passed, and returns the number of bytes."""
    count = 0
    while count <= limit and (part := stream.read(_CHUNK)):
        count += len(part)
    return count


def skip(stream: Readable, count: int) -> None:
    """Reads `count` bytes and drops them.

    Raises:
        EOFError: The stream ends early.
    """
    while count > 0:
        part = stream.read(min(_CHUNK, count))
        if not part:
            raise EOFError("the file ends before its voxels")
        count -= len(part)
