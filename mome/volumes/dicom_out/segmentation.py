"""DICOM SEG objects through highdicom: label maps, or one binary frame per structure and slice.

The frames lie exactly on the source slices, each with its own position, so that tilted series and irregular steps are
stored as they are. Source: DICOM PS3.3 A.51 (Segmentation) and A.86.1 (Label Map Segmentation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.content import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from pydicom.valuerep import format_number_as_ds

from mome.volumes.dicom.kinds import MULTI_FRAME_CLASSES
from mome.volumes.dicom.quiet import quiet_decoders
from mome.volumes.dicom.source import SourceSlices
from mome.volumes.dicom_out.codes import PRIVATE_SCHEME, code_item, private_scheme_item, structure_codes
from mome.volumes.dicom_out.equipment import (
    MANUFACTURER,
    MODEL_NAME,
    algorithm_name,
    algorithm_version,
    software_version,
)
from mome.volumes.dicom_out.merging import merge_binary
from mome.volumes.dicom_out.source_images import instance_uids, source_header
from mome.volumes.mask_set import MaskSet

_ARTIFICIAL_INTELLIGENCE = ("123110", "DCM", "Artificial Intelligence")  # DICOM PS3.16 CID 7162


def make_segmentation(
    masks: MaskSet,
    source: SourceSlices,
    arrays: Sequence[np.ndarray],
    members: Sequence[Sequence[int]],
    *,
    binary: bool,
) -> Dataset:
    """Returns a SEG object.

    Its UIDs are new each time: two objects with one UID must be equal to the last byte, and dates differ.

    Args:
        masks: Names, colours and the model.
        source: The slices of the scan.
        arrays: Label maps (slices, rows, columns), one or several; see `mome.volumes.dicom_out.layers.Layers`.
        members: The structures of each.
        binary: Store a frame of bits per structure and slice; else one label map, compressed by RLE.

    Raises:
        InputError: The headers of the series cannot be referred to.
    """
    header, uids = source_header(source), instance_uids(source)
    images = _source_images(header, source, uids)
    common: dict[str, Any] = {
        "series_instance_uid": generate_uid(prefix=None),
        "series_number": min(max(1, int(source.slices[0].header.series_number) + 1000), 9999),
        "sop_instance_uid": generate_uid(prefix=None),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": software_version(),
        "device_serial_number": masks.model_version or "none",
        "content_label": "MOME_SEG",
        "specific_character_set": "ISO_IR 192",  # UTF-8, for prompts in any language
        "content_description": "Masks by text prompts, not for diagnosis",
        "series_description": f"Segmentation, {algorithm_name(masks.model)}"[:64],
    }
    parts = []
    with quiet_decoders():
        for array, indices in zip(arrays, members, strict=True):
            parts.append(
                Segmentation(
                    source_images=images,
                    pixel_array=array,
                    segmentation_type=SegmentationTypeValues.BINARY if binary else SegmentationTypeValues.LABELMAP,
                    segment_descriptions=[
                        _description(number, masks.labels[index], masks) for number, index in enumerate(indices, 1)
                    ],
                    transfer_syntax_uid=ExplicitVRLittleEndian if binary else RLELossless,
                    **common,
                )
            )
        made = merge_binary(parts, members) if len(parts) > 1 else parts[0]
    made.ContentCreatorName = ""
    _refer_to_frames(made, source, uids)
    if any(structure_codes(entry).type[1] == PRIVATE_SCHEME for entry in masks.labels):
        made.CodingSchemeIdentificationSequence = [
            *made.get("CodingSchemeIdentificationSequence", []),
            private_scheme_item(),
        ]
    return made


def _source_images(header: Dataset, source: SourceSlices, uids: list[tuple[str, str]]) -> list[Dataset]:
    """Returns what highdicom needs of the source: a data set per slice, or one whose frames are the slices."""
    first = source.slices[0]
    if not _are_frames(source):
        images = []
        for number, (image, (sop_class, uid)) in enumerate(zip(source.slices, uids, strict=True)):
            made = header if number == 0 else Dataset()
            made.SOPClassUID, made.SOPInstanceUID = sop_class, uid
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"):
                setattr(made, keyword, header.get(keyword))
            made.Rows, made.Columns = image.header.rows, image.header.columns
            # Orientations of the slices differ by rounding alone, and highdicom wants them equal.
            made.ImagePositionPatient = _decimals(image.position)
            made.ImageOrientationPatient = _decimals(first.orientation)
            made.PixelSpacing, made.SliceThickness = _decimals(first.pixel_spacing), _thickness(source)
            images.append(made)
        return images
    shared = Dataset()
    shared.PixelMeasuresSequence = PixelMeasuresSequence(_decimals(first.pixel_spacing), _thickness(source))
    shared.PlaneOrientationSequence = PlaneOrientationSequence("PATIENT", _decimals(first.orientation))
    header.NumberOfFrames, header.SharedFunctionalGroupsSequence = len(source.slices), [shared]
    frames = []
    for image in source.slices:
        frame = Dataset()
        frame.PlanePositionSequence = PlanePositionSequence("PATIENT", _decimals(image.position))
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence = frames
    return [header]


def _are_frames(source: SourceSlices) -> bool:
    """Says whether the slices are frames of multi-frame files, each of which may hold one frame only."""
    headers = [image.header for image in source.slices]
    return any(header.frames > 1 or header.sop_class in MULTI_FRAME_CLASSES for header in headers)


def _thickness(source: SourceSlices) -> float:
    """Returns the thickness of the slices in mm, else their distance."""
    thickness = source.slices[0].thickness
    return _decimals([thickness if thickness and thickness > 0 else source.step])[0]


def _decimals(values: Any) -> list[float]:
    """Returns numbers that a decimal string of 16 characters holds."""
    return [float(format_number_as_ds(float(value))) for value in values]


def _description(number: int, entry: dict[str, Any], masks: MaskSet) -> SegmentDescription:
    """Returns the description of one structure."""
    codes = structure_codes(entry)
    made = SegmentDescription(
        segment_number=number,
        segment_label=codes.name,
        segmented_property_category=CodedConcept(*codes.category),
        segmented_property_type=CodedConcept(*codes.type),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm_name(masks.model),
            version=algorithm_version(masks.model_version),
            family=CodedConcept(*_ARTIFICIAL_INTELLIGENCE),
        ),
        display_color=CIELabColor.from_rgb(*entry["color"]),
    )
    if codes.side is not None:
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [code_item(codes.side)]
    if codes.remark:
        made.SegmentDescription = codes.remark
    return made


def _refer_to_frames(made: Dataset, source: SourceSlices, uids: list[tuple[str, str]]) -> None:
    """Corrects the references to frames of multi-frame files.

    highdicom was given the used slices as the frames of one file. Their true files and numbers replace those.
    """
    if not _are_frames(source):
        return
    for frame in made.PerFrameFunctionalGroupsSequence:
        for derivation in frame.DerivationImageSequence:
            for item in derivation.SourceImageSequence:
                index = int(item.ReferencedFrameNumber) - 1
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = uids[index]
                item.ReferencedFrameNumber = source.slices[index].frame + 1
    references = []
    for sop_class, uid in dict.fromkeys(uids):
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = sop_class, uid
        references.append(reference)
    made.SourceImageSequence = references
    made.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references
