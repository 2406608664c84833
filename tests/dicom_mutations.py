"""Random damage to DICOM series: elements, bytes, lengths, mixtures. Everything follows from a seed.

Elements are rewritten as bytes, because pydicom refuses to write most of what damaged files hold.
"""

from __future__ import annotations

import functools
import io
import random
import struct
from pathlib import Path

import numpy as np
from dicom_series import SAGITTAL, along_z, enhanced, series, tilted
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import RLELossless

_LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"UC", b"UR")
_GEOMETRY = (
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
    "GantryDetectorTilt", "PatientPosition", "InstanceNumber", "AcquisitionNumber", "ImageType",
)  # fmt: skip
_OTHERS = (
    "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "StudyInstanceUID", "SeriesNumber",
    "PatientID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "ContentTime", "TriggerTime", "TemporalPositionIdentifier",
    "ConcatenationUID", "InConcatenationTotalNumber", "ImagesInAcquisition", "SpecificCharacterSet", "PixelData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ReconstructionDiameter",
)  # fmt: skip
_TEXTS = (
    "", " ", "0", "1", "-1", "2", "3", "0.5", "1e-9", "1e9", "1e38", "1e308", "1e999", "-1e308", "nan", "inf", "-inf",
    "NaN", "1,5", "abc", "1\\2", "1\\2\\3", "0\\0\\0", "nan\\0\\0", "1\\0\\0\\0\\1\\0", "1\\0\\0\\1\\0\\0",
    "0\\0\\0\\0\\0\\0", "0\\1\\0\\0\\0\\-1", "0.7\\0.7", "-1\\-1", "1e-300\\1", "1e6\\1e6", "-7.25\\-11.5\\1e5",
    "-7.25\\-11.5\\29", "-7.25\\-11.5\\29.02", "9" * 400, "1.2.3", "CT", "MR", "QUADRUPED", "\x1b[31m", "x" * 70_000,
    "ORIGINAL\\PRIMARY\\LOCALIZER",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 7, 8, 11, 12, 15, 16, 17, 31, 32, 255, 4096, 32_767, 32_768, 65_535)


def _file_bytes(image) -> bytes:
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@functools.cache
def _bases() -> dict[str, list[bytes]]:
    """Whole series: name → the bytes of its files."""
    heights = np.arange(6) * 3.0
    along_x = np.array([[20.0 + 3 * k, -11.5, 40] for k in range(6)])
    packed = series(along_z(heights))
    for image in packed:
        image.compress(RLELossless, generate_instance_uid=False)
    made = {
        "plain": series(along_z(heights)),
        "tilted": series(along_z(heights), tilted(12)),
        "sagittal": series(along_x, SAGITTAL),
        "irregular": series(along_z([0, 3, 6, 10, 14, 18])),
        "other study": series(along_z(heights) + (5, 0, 100), SeriesInstanceUID="1.2.9", PatientID="other"),
        "rle": packed,
        "enhanced": [enhanced(along_z(heights))],
    }
    return {name: [_file_bytes(image) for image in images] for name, images in made.items()}


def _elements(data: bytes) -> tuple[bytes, dict[int, tuple[bytes, bytes]]]:
    """Splits a file of explicit little endian: what comes before the data set, and tag → (VR, value)."""
    at = 132 + 12 + struct.unpack("<I", data[140:144])[0]
    head, found = data[:at], {}
    while at < len(data):
        group, number, kind, length = struct.unpack("<HH2sH", data[at : at + 8])
        at += 8
        if kind in _LONG:
            length = struct.unpack("<I", data[at : at + 4])[0]
            at += 4
        length = len(data) - at if length == 0xFFFFFFFF else length  # only of compressed pixels, which come last
        found[group << 16 | number] = (kind, data[at : at + length])
        at += length
    return head, found


def _joined(head: bytes, elements: dict[int, tuple[bytes, bytes]], undefined: bool) -> bytes:
    out = [head]
    for tag, (kind, value) in sorted(elements.items()):
        value += b"\0" * (len(value) % 2)
        out.append(struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind))
        if kind in _LONG:
            length = 0xFFFFFFFF if undefined and tag == 0x7FE00010 else len(value)
            out.append(struct.pack("<HI", 0, length) + value)
        else:
            out.append(struct.pack("<H", len(value) & 0xFFFF) + value)
    return b"".join(out)


def _change_element(elements: dict[int, tuple[bytes, bytes]], keyword: str, kind: int, rng: random.Random) -> None:
    tag = tag_for_keyword(keyword)
    assert tag is not None
    representation = dictionary_VR(tag)[:2].encode()
    old = elements.get(tag, (representation, b""))
    if kind == 0:
        elements.pop(tag, None)
    elif kind == 1:  # another VR
        elements[tag] = (rng.choice([b"UN", b"LO", b"OB", b"SQ", b"FD", b"US", b"DS", b"ZZ"]), old[1])
    elif kind == 2 and len(old[1]) > 1:
        elements[tag] = (old[0], old[1][: rng.randrange(len(old[1]))])
    elif kind == 3:
        elements[tag] = (old[0], old[1] + (b"" if representation == b"US" else b"\\") + old[1])
    elif representation in (b"US", b"SS"):
        elements[tag] = (representation, struct.pack("<H", rng.choice(_NUMBERS)))
    else:
        elements[tag] = (old[0], rng.choice(_TEXTS).encode())


def _damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    within = rng.choice([len(out), 900])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(132, max(133, min(within, len(out))))
        kind = rng.randrange(4)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, rng.randbytes(4)])
        elif kind == 2:
            del out[at : at + rng.choice([1, 2, 8, 40])]
        else:
            out[at:at] = out[at : at + rng.choice([1, 2, 8, 40])]
    return bytes(out)


def write_damaged_series(seed: int, folder: Path) -> str:
    """Writes a damaged series into an empty folder and returns words for the damage."""
    rng = random.Random(seed)
    bases = _bases()
    base = rng.choice(list(bases))
    files = list(bases[base])
    damage = rng.choice(["element", "element", "geometry", "geometry", "bytes", "end", "mixed"])
    which = rng.choice(
        [[rng.randrange(len(files))], list(range(len(files))), rng.sample(range(len(files)), len(files) // 2)]
    )
    if damage in ("element", "geometry"):
        keywords = [rng.choice(_GEOMETRY if damage == "geometry" else _OTHERS) for _ in range(rng.choice([1, 1, 2, 3]))]
        same, first = rng.random() < 0.5, rng.randrange(2**32)
        for index in which:
            draws = random.Random(first) if same else rng
            head, elements = _elements(files[index])
            for keyword in keywords:
                _change_element(elements, keyword, draws.randrange(8), draws)
            files[index] = _joined(head, elements, base == "rle")
        damage += f" {', '.join(keywords)}"
    elif damage == "bytes":
        for index in which:
            files[index] = _damaged_bytes(files[index], rng)
    elif damage == "end":
        for index in which:
            files[index] = files[index][: rng.randrange(len(files[index]))]
    else:
        other = rng.choice(list(bases))
        added = list(bases[other])
        rng.shuffle(added)
        files += added[: rng.randint(1, len(added))]
        damage += f" with {other}"
    ending = rng.choice([".dcm", ""])
    for number, data in enumerate(files):
        (folder / f"{number:03d}{ending}").write_bytes(data)
    return f"{base}, {damage}, slices {which}"
