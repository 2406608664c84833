"""Joins binary SEG objects of one scan, whose structures overlap each other, into one object.

highdicom takes overlapping structures as one array (slices, rows, columns, structures), which for a hundred structures
needs many gigabytes. Label maps of one or two layers need as much memory as one or two masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.dataset import Dataset


def merge_binary(parts: Sequence[Dataset], members: Sequence[Sequence[int]]) -> Dataset:
    """Returns the first object with the structures and frames of all, sorted by structure and place.

    Args:
        parts: Objects of type BINARY, made of the same source slices.
        members: Per object the structures by their numbers in the whole, from 0; the segment n of an object is its
            member n − 1.
    """
    made = parts[0]
    pixels = made.Rows * made.Columns
    descriptions: dict[int, Dataset] = {}
    frames: list[tuple[int, float, Dataset, np.ndarray]] = []
    for part, indices in zip(parts, members, strict=True):
        for item in part.SegmentSequence:
            number = indices[item.SegmentNumber - 1] + 1
            item.SegmentNumber = number
            descriptions[number] = item
        single = part.SharedFunctionalGroupsSequence[0].get("SegmentIdentificationSequence")
        bits = np.frombuffer(part.PixelData, dtype=np.uint8)
        row, column = np.reshape(
            part.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)
        ).astype(float)
        normal = np.cross(row, column)
        for index, frame in enumerate(part.PerFrameFunctionalGroupsSequence):
            identity = single or frame.SegmentIdentificationSequence
            number = indices[int(identity[0].ReferencedSegmentNumber) - 1] + 1
            own = Dataset()
            own.ReferencedSegmentNumber = number
            frame.SegmentIdentificationSequence = [own]
            height = float(np.asarray(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float) @ normal)
            frames.append((number, height, frame, _frame_bits(bits, index, pixels)))
        if single is not None:
            del part.SharedFunctionalGroupsSequence[0].SegmentIdentificationSequence
    places = {height: place for place, height in enumerate(sorted({round(f[1], 4) for f in frames}), 1)}
    frames.sort(key=lambda frame: frame[:2])
    for number, height, frame, _ in frames:
        frame.FrameContentSequence[0].DimensionIndexValues = [number, places[round(height, 4)]]
    made.SegmentSequence = [descriptions[number] for number in sorted(descriptions)]
    made.PerFrameFunctionalGroupsSequence = [frame for _, _, frame, _ in frames]
    made.NumberOfFrames = len(frames)
    made.SegmentsOverlap = "YES"
    if "DimensionOrganizationType" in made:
        del made.DimensionOrganizationType  # frames of several structures are no single volume
    packed = _joined([bits for _, _, _, bits in frames], pixels)
    made.PixelData = packed + b"\0" * (len(packed) % 2)
    return made


def _frame_bits(bits: np.ndarray, index: int, pixels: int) -> np.ndarray:
    """Returns the packed bits of one frame. Frames follow each other without padding (DICOM PS3.5 section 8.1.1)."""
    start, stop = index * pixels, (index + 1) * pixels
    if pixels % 8 == 0:
        return bits[start // 8 : stop // 8]
    unpacked = np.unpackbits(bits[start // 8 : -(-stop // 8)], bitorder="little")
    return np.packbits(unpacked[start % 8 : start % 8 + pixels], bitorder="little")


def _joined(frames: list[np.ndarray], pixels: int) -> bytes:
    """Returns frames packed one after the other without padding."""
    if pixels % 8 == 0:
        return b"".join(frame.tobytes() for frame in frames)
    unpacked = [np.unpackbits(frame, bitorder="little", count=pixels) for frame in frames]
    return np.packbits(np.concatenate(unpacked), bitorder="little").tobytes()
