"""Headers of DICOM files: what kind of image a file holds and whether it is complete."""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mome.errors import InputError
from mome.volumes.dicom.bounded import BoundedFile
from mome.volumes.dicom.damaged import DamagedFile
from mome.volumes.dicom.elements import UNDEFINED_LENGTH, integer, is_short, printable
from mome.volumes.dicom.statements import STATEMENTS, header_doubts, other_quantity

# Attributes that are read only to recognise them in the description of a series. They are not kept.
_IDENTIFYING = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientBirthName",
    "OtherPatientIDs",
    "OtherPatientNames",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "OperatorsName",
    "InstitutionName",
)
_KEYWORDS = (
    "SpecificCharacterSet",
    "PatientSex",
    "SOPClassUID",
    "Modality",
    "ImageType",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "ConvolutionKernel",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "AcquisitionTime",
    "ContentTime",
    "TriggerTime",
    "NominalPercentageOfCardiacPhase",
    "KVP",
    "ImagesInAcquisition",
    "ConcatenationUID",
    "InConcatenationNumber",
    "InConcatenationTotalNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SliceLocation",
    "GantryDetectorTilt",
    "ReconstructionDiameter",
    "AnatomicalOrientationType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ModalityLUTSequence",
    "LossyImageCompression",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *STATEMENTS,
    *_IDENTIFYING,
)
_DEFLATED = "1.2.840.10008.1.2.1.99"


@dataclass(frozen=True)
class ImageHeader:
    """What the header of one file says about its image or images.

    Attributes:
        file: The file.
        series_uid: SeriesInstanceUID.
        series_number: SeriesNumber, 0 where it is missing.
        description: SeriesDescription, empty where it could identify the patient.
        sop_class: SOPClassUID, which says what kind of object the file holds.
        modality: Modality, as in "CT".
        samples: Samples per pixel; 3 for colour.
        photometric: PhotometricInterpretation, as in "MONOCHROME2".
        rows: Pixels along a column.
        columns: Pixels along a row.
        frames: Number of frames.
        padding: The lowest and the highest stored value that marks pixels outside the image, or None.
        bits: BitsAllocated, BitsStored and HighBit; the last is BitsStored − 1 where it is missing.
        is_animal: Whether AnatomicalOrientationType says that the axes are those of a quadruped.
        concatenation: ConcatenationUID, InConcatenationNumber and InConcatenationTotalNumber of a part of a multi-frame
            image that was split into several files, or None.
        acquisition_images: ImagesInAcquisition, or None.
        origin: A hash of patient, study, frame of reference and reconstruction kernel; slices of one volume share it.
        study_day: A hash of StudyDate; slices of one study share it.
        person: Hashes of the patient's name, birth date and sex; empty where the header does not state them.
        is_lossy: Whether LossyImageCompression says that the pixels were compressed with loss.
        quantity: What the header says that values are instead of HU, or empty.
        doubts: Sentences about what the header says of the images, for the user.
        has_pixels: Whether pixel data follow the header.
        is_truncated: Whether the file ends before its pixel data do.
        is_too_long: Whether uncompressed pixel data are longer, by a row or more, than the size of the image.
    """

    file: Path
    series_uid: str
    series_number: int
    description: str
    sop_class: str
    modality: str
    samples: int
    photometric: str
    rows: int
    columns: int
    frames: int
    padding: tuple[int, int] | None
    bits: tuple[int, int, int]
    is_animal: bool
    concatenation: tuple[str, int, int] | None
    acquisition_images: int | None
    origin: str
    study_day: str
    person: tuple[str, ...]
    is_lossy: bool
    quantity: str
    doubts: tuple[str, ...]
    has_pixels: bool
    is_truncated: bool
    is_too_long: bool


def require_pydicom(where: str | None = None) -> None:
    """Checks that pydicom is installed.

    Raises:
        InputError: It is not.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise InputError(
            "DICOM is read through pydicom, which is not installed",
            where=where,
            hint='pip install "mome[dicom]", or convert the scan to .nii.gz',
        ) from error


def read_header(path: Path) -> tuple[ImageHeader, Any]:
    """Reads the header of a file, without its pixels.

    pydicom's warnings quote values, so callers read inside `quiet_decoders`.

    Returns:
        The header and the pydicom data set it was read from.

    Raises:
        DamagedFile: The file is empty, ends within its header, or is no DICOM file.
    """
    import pydicom

    size = os.path.getsize(path)
    if size == 0:
        raise DamagedFile("0 bytes")
    try:
        with BoundedFile(path) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_KEYWORDS))
            header = _image_header(path, dataset, *_pixel_data(file, size, dataset))
    except DamagedFile:
        raise
    except Exception as error:  # pydicom raises errors of many types for damaged files
        raise DamagedFile("its header cannot be read") from error
    if not header.sop_class and not header.modality:
        raise DamagedFile("truncated, or no DICOM file")
    return header, dataset


def _pixel_data(file: Any, size: int, dataset: Any) -> tuple[bool, bool, bool]:
    """Says whether pixel data follow the header, whether the file ends too early, and whether pixel data are too long.

    Args:
        file: The open file, at the place where the header ended.
        size: The size of the file in bytes.
        dataset: The header.
    """
    if str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")) == _DEFLATED:
        return True, False, False  # The whole file was inflated in memory; the place in the file says nothing.
    start = file.tell()
    element = file.read(12)
    if len(element) < 12:
        # An element that is skipped by its length ends beyond the end of a truncated file; one that is read is short.
        short = any(is_short(dataset.get_item(tag)) for tag in dataset.keys())
        return False, start > size or len(element) > 0 or short, False
    is_implicit, is_little = dataset.original_encoding
    encoding = "<I" if is_little else ">I"
    length = struct.unpack(encoding, element[4:8] if is_implicit else element[8:12])[0]
    header_length = 8 if is_implicit else 12
    if length == UNDEFINED_LENGTH:
        return True, False, False
    pixels = [integer(dataset, keyword) or 1 for keyword in ("Rows", "Columns", "NumberOfFrames")]
    pixel = (integer(dataset, "BitsAllocated") or 8) // 8
    expected, row = math.prod(pixels) * pixel, pixels[1] * pixel
    is_truncated = start + header_length + length > size or length < expected
    return True, is_truncated, not is_truncated and length >= expected + max(row, 2)


def _origin(dataset: Any) -> str:
    """Hashes what all slices of a volume share; the values themselves may identify the patient and are not kept."""
    keys = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "ConvolutionKernel")
    return hashlib.sha256(repr([str(dataset.get(key) or "") for key in keys]).encode()).hexdigest()


def _person(dataset: Any) -> tuple[str, ...]:
    """Hashes who is in the image. The case of letters and empty parts of a name do not matter."""
    values = [
        printable(dataset.get(key)).upper().rstrip("^ ") for key in ("PatientName", "PatientBirthDate", "PatientSex")
    ]
    return tuple(hashlib.sha256(value.encode()).hexdigest() if value else "" for value in values)


def _image_header(path: Path, dataset: Any, has_pixels: bool, is_truncated: bool, is_too_long: bool) -> ImageHeader:
    meta = getattr(dataset, "file_meta", {})
    return ImageHeader(
        file=path,
        series_uid=str(dataset.get("SeriesInstanceUID") or ""),
        series_number=integer(dataset, "SeriesNumber") or 0,
        description=_description(dataset),
        sop_class=str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
        modality=printable(dataset.get("Modality")).upper(),
        samples=integer(dataset, "SamplesPerPixel") or 1,
        photometric=printable(dataset.get("PhotometricInterpretation")).upper(),
        rows=integer(dataset, "Rows") or 0,
        columns=integer(dataset, "Columns") or 0,
        frames=max(1, integer(dataset, "NumberOfFrames") or 1),
        padding=_padding(dataset),
        bits=_bits(dataset),
        is_animal=printable(dataset.get("AnatomicalOrientationType")).upper() == "QUADRUPED",
        concatenation=_concatenation(dataset),
        acquisition_images=integer(dataset, "ImagesInAcquisition"),
        origin=_origin(dataset),
        study_day=hashlib.sha256(printable(dataset.get("StudyDate")).encode()).hexdigest(),
        person=_person(dataset),
        is_lossy=str(dataset.get("LossyImageCompression") or "").strip() == "01",
        quantity=other_quantity(dataset),
        doubts=header_doubts(dataset),
        has_pixels=has_pixels,
        is_truncated=is_truncated,
        is_too_long=is_too_long,
    )


def _bits(dataset: Any) -> tuple[int, int, int]:
    allocated = integer(dataset, "BitsAllocated") or 16
    stored = integer(dataset, "BitsStored")
    stored = allocated if stored is None else stored
    high = integer(dataset, "HighBit")
    return allocated, stored, stored - 1 if high is None else high


def _concatenation(dataset: Any) -> tuple[str, int, int] | None:
    if not dataset.get("ConcatenationUID"):
        return None
    number, total = integer(dataset, "InConcatenationNumber"), integer(dataset, "InConcatenationTotalNumber")
    return str(dataset.ConcatenationUID), number or 1, total or 0


def _description(dataset: Any) -> str:
    """Returns the description of the series, or an empty text where it holds a name, an id or a date."""
    text = printable(dataset.get("SeriesDescription"))
    lower = text.lower()
    for keyword in _IDENTIFYING:
        words = re.split(r"[\W_]+", str(dataset.get(keyword) or "").lower())
        if any(len(word) > 2 and word in lower for word in words):
            return ""
    return "" if re.search(r"\d{5,}|\d{1,4}[-./]\d{1,2}[-./]\d{1,4}", text) else text


def _padding(dataset: Any) -> tuple[int, int] | None:
    """Returns the range of stored values that mark pixels outside the image, with the sign of the pixels."""
    bits, is_signed = integer(dataset, "BitsAllocated") or 16, integer(dataset, "PixelRepresentation") == 1
    limits: list[int] = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = dataset.get(keyword)
        if isinstance(value, bytes):  # The type is "US or SS" where pydicom does not know the sign.
            value = int.from_bytes(value, "little" if dataset.original_encoding[1] else "big")
        if isinstance(value, int):
            value %= 1 << bits
            limits.append(value - (1 << bits) if is_signed and value >= 1 << (bits - 1) else value)
        elif not limits:
            return None
    return min(limits), max(limits)
