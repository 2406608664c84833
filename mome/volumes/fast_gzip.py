"""Writes gzip data of which long runs are zeros, with a fast deflate where one is installed.

One gzip member (RFC 1952) is made of deflate blocks (RFC 1951). Pieces are compressed alone and end with a full flush,
so that their bytes can be joined, and those of a run of zeros are compressed once and written again. The checksum of
joined pieces is computed from theirs, as in zlib's `crc32_combine`: appending n bytes multiplies a CRC-32 by x^(8n)
modulo its polynomial.
"""

from __future__ import annotations

import importlib
import struct
import zlib
from functools import lru_cache
from types import ModuleType
from typing import BinaryIO

# Magic number, deflate, no flags, no time of change, no extra flags, unknown system.
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
# A last block of fixed codes that holds nothing.
_LAST_BLOCK = b"\x03\x00"
_WINDOW_BITS = -15  # deflate without a header
# The polynomial of CRC-32 in the bit order of zlib, and 1 in that order.
_POLYNOMIAL, _ONE = 0xEDB88320, 0x80000000
_LONGEST_RUN = 1 << 24


class GzipWriter:
    """Writes one gzip member piece by piece.

    Args:
        file: Receives the compressed bytes.

    `close` ends the member; the file stays open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._crc, self._size = file, 0, 0
        self._library, self._level = deflate_library()
        file.write(_HEADER)

    def write(self, data: bytes | memoryview) -> None:
        """Writes a piece; pieces of a megabyte and more are compressed best."""
        view = memoryview(data).cast("B")
        if not view.nbytes:
            return
        self._file.write(_deflated(view, self._library, self._level))
        self._add(self._library.crc32(view), view.nbytes)

    def write_zeros(self, count: int) -> None:
        """Writes `count` bytes of zero."""
        while count > 0:
            run = min(_LONGEST_RUN, 1 << (count.bit_length() - 1))
            self._file.write(_deflated_zeros(run, self._library.__name__, self._level))
            self._add(_crc_of_zeros(run), run)
            count -= run

    def close(self) -> None:
        """Writes the last block, the checksum and the size."""
        self._file.write(_LAST_BLOCK + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))

    def _add(self, crc: int, size: int) -> None:
        self._crc = joined_crc32(self._crc, crc, size)
        self._size += size


def joined_crc32(first: int, second: int, second_size: int) -> int:
    """Returns the CRC-32 of two pieces one after the other.

    Args:
        first: The CRC-32 of the first piece.
        second: The CRC-32 of the second piece.
        second_size: Bytes of the second piece.
    """
    return _product(_power_of_x(8 * second_size), first) ^ second


def deflate_library() -> tuple[ModuleType, int]:
    """Returns the module that compresses, with the interface of `zlib`, and its level.

    Masks are simple images; the lowest levels make files that are hardly larger (our choice).
    """
    for name, level in (("isal.isal_zlib", 1), ("zlib_ng.zlib_ng", 2)):
        try:
            return importlib.import_module(name), level
        except ImportError:
            continue
    return zlib, 1


def _deflated(view: memoryview, library: ModuleType, level: int) -> bytes:
    """Returns whole deflate blocks, none of them the last, that end at a byte and refer to no earlier piece."""
    compressor = library.compressobj(level, zlib.DEFLATED, _WINDOW_BITS)
    return compressor.compress(view) + compressor.flush(zlib.Z_FULL_FLUSH)


@lru_cache(maxsize=64)
def _deflated_zeros(count: int, library: str, level: int) -> bytes:
    return _deflated(memoryview(bytes(count)), importlib.import_module(library), level)


@lru_cache(maxsize=64)
def _crc_of_zeros(count: int) -> int:
    return zlib.crc32(bytes(count))


@lru_cache(maxsize=1024)
def _power_of_x(exponent: int) -> int:
    """Returns x to a power, modulo the polynomial of CRC-32."""
    result, square = _ONE, _ONE >> 1  # 1 and x: the highest bit is the lowest power
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(one: int, other: int) -> int:
    """Returns the product of two polynomials over GF(2), modulo the polynomial of CRC-32."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = (one << 1) & 0xFFFFFFFF
        other = (other >> 1) ^ (_POLYNOMIAL if other & 1 else 0)
    return product
