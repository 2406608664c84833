"""Deflated DICOM: the bytes that a compressed file may inflate to are bounded by what its header needs.

pydicom inflates the whole file in memory (DICOM PS3.5 A.5). A damaged or hostile file of a megabyte may inflate to a
gigabyte.
"""

from __future__ import annotations

import io
import math
import zlib

from mome.volumes.dicom.damaged import DamagedFile
from mome.volumes.dicom.elements import integer

# Space for everything but the pixels (our choice): the functional groups of thousands of frames take some megabytes.
_HEADER_BYTES = 16 << 20
_CHUNK = 1 << 20
_PIXEL_DATA = 0x7FE00010
_SIZES = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")


def check_inflated_size(compressed: bytes) -> None:
    """Checks that deflated data inflate to no more than their pixels and a header need.

    At most the header's space and one chunk are kept in memory. Data that are not deflated pass.

    Args:
        compressed: A raw deflate stream, without header and checksum.

    Raises:
        DamagedFile: They inflate to more.
    """
    try:
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        start = stream.decompress(compressed, _HEADER_BYTES)
        if stream.eof or len(start) < _HEADER_BYTES:
            return
        limit = _HEADER_BYTES + _bytes_of_pixels(start)
        size = len(start)
        while not stream.eof and (chunk := stream.decompress(stream.unconsumed_tail, _CHUNK)):
            size += len(chunk)
            if size > limit:
                raise DamagedFile(f"it inflates to more than the {limit / 1e6:,.0f} MB that its header accounts for")
    except zlib.error:
        return


def _bytes_of_pixels(start: bytes) -> int:
    """Returns the bytes of the pixels by the start of an inflated data set; 0 where it gives no size."""
    from pydicom.filereader import read_dataset

    try:
        dataset = read_dataset(
            io.BytesIO(start),
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, vr, length: tag == _PIXEL_DATA,
            specific_tags=[*_SIZES],  # type: ignore[list-item]
        )
        rows, columns, frames, samples, bits = (integer(dataset, keyword) for keyword in _SIZES)
    except Exception:  # pydicom raises errors of many types; a header that cannot be read accounts for no pixels
        return 0
    return math.prod(max(0, value) for value in (rows or 0, columns or 0, frames or 1, samples or 1)) * (
        -(-max(0, bits or 16) // 8)
    )
