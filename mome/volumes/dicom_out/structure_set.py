"""DICOM RT Structure Sets: closed planar contours on the source slices (DICOM PS3.3 A.19, C.8.8.5 to C.8.8.8).

The transfer syntax is Implicit VR Little Endian, because explicit VR limits the points of a contour to 64 KB.
"""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from mome.volumes.dicom.source import SourceSlices
from mome.volumes.dicom_out.codes import PRIVATE_SCHEME, code_item, private_scheme_item, structure_codes
from mome.volumes.dicom_out.contours import plane_contours
from mome.volumes.dicom_out.equipment import MANUFACTURER, MODEL_NAME, algorithm_name, algorithm_version
from mome.volumes.dicom_out.source_images import (
    PATIENT_AND_STUDY,
    SlicedMask,
    instance_uids,
    mask_at_slices,
    slice_steps,
    source_header,
)
from mome.volumes.mask_set import MaskSet

_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
_CONTOUR_DATA = 0x30060050
_UTF8 = "ISO_IR 192"


def make_structure_set(masks: MaskSet, source: SourceSlices) -> Dataset:
    """Returns a structure set with one region of interest per structure, in the order of the masks.

    Its UIDs are new each time, as those of a SEG.

    Args:
        masks: The masks of a scan that was read from DICOM; one mask is unpacked at a time.
        source: The slices of the scan.

    Raises:
        InputError: The headers of the series cannot be referred to.
    """
    header = source_header(source)
    references = [_reference(image, *uids) for image, uids in zip(source.slices, instance_uids(source), strict=True)]
    made, now = Dataset(), datetime.datetime.now()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.SpecificCharacterSet = _UTF8
    made.SOPClassUID, made.SOPInstanceUID = _STRUCTURE_SET, generate_uid(prefix=None)
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    for keyword in PATIENT_AND_STUDY:
        if keyword in header:
            setattr(made, keyword, str(header.get(keyword) or ""))
    made.InstanceCreationDate = made.StructureSetDate = made.SeriesDate = now.strftime("%Y%m%d")
    made.InstanceCreationTime = made.StructureSetTime = made.SeriesTime = now.strftime("%H%M%S")
    made.Modality, made.Manufacturer, made.ManufacturerModelName = "RTSTRUCT", MANUFACTURER, MODEL_NAME
    made.SoftwareVersions = algorithm_version(masks.model_version)
    made.SeriesInstanceUID = generate_uid(prefix=None)
    made.SeriesNumber = min(int(source.slices[0].header.series_number) + 2000, 9999)
    made.SeriesDescription = f"Structures, {algorithm_name(masks.model)}"[:64]
    made.OperatorsName, made.InstanceNumber = "", 1
    made.FrameOfReferenceUID = header.FrameOfReferenceUID
    made.PositionReferenceIndicator = header.PositionReferenceIndicator
    made.StructureSetLabel = "MOME"
    made.StructureSetDescription = "Masks by text prompts, not for diagnosis or treatment"
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(header, references)]
    codes = [structure_codes(entry) for entry in masks.labels]
    regions, contours, observations = [], [], []
    for number, (entry, found) in enumerate(zip(masks.labels, codes, strict=True), 1):
        region = Dataset()
        region.ROINumber, region.ROIName = number, found.name
        region.ReferencedFrameOfReferenceUID = header.FrameOfReferenceUID
        region.ROIGenerationAlgorithm = "AUTOMATIC"
        region.ROIGenerationDescription = algorithm_name(masks.model)
        regions.append(region)
        contour = Dataset()
        contour.ROIDisplayColor = [int(part) for part in entry["color"]]
        contour.ReferencedROINumber = number
        items = _contours(mask_at_slices(masks, entry["name"], source), source, references)
        if items:
            contour.ContourSequence = items
        contours.append(contour)
        observations.append(_observation(number, found))
    made.StructureSetROISequence, made.ROIContourSequence = regions, contours
    made.RTROIObservationsSequence = observations
    if any(found.type[1] == PRIVATE_SCHEME for found in codes):
        made.CodingSchemeIdentificationSequence = [private_scheme_item()]
    return made


def _reference(image: Any, sop_class: str, uid: str) -> Dataset:
    """Returns the reference to the file of a slice, and to its frame in a multi-frame file."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    if image.header.frames > 1:
        item.ReferencedFrameNumber = image.frame + 1
    return item


def _frame_of_reference(header: Dataset, references: list[Dataset]) -> Dataset:
    """Returns the item that lists the study, the series and all slices the contours were drawn on."""
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = header.SeriesInstanceUID, references
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired; readers expect it
    study.ReferencedSOPInstanceUID, study.RTReferencedSeriesSequence = header.StudyInstanceUID, [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = header.FrameOfReferenceUID, [study]
    return frame


def _observation(number: int, codes: Any) -> Dataset:
    """Returns the observation of a region: its code, and no claim of what it is for in a treatment."""
    item, code = Dataset(), code_item(codes.type)
    item.ObservationNumber = item.ReferencedROINumber = number
    item.RTROIInterpretedType, item.ROIInterpreter = "", ""
    if codes.side is not None:
        code.SegmentedPropertyTypeModifierCodeSequence = [code_item(codes.side)]
    item.RTROIIdentificationCodeSequence = [code]
    if codes.remark:
        item.ROIObservationDescription = codes.remark
    return item


def _contours(mask: SlicedMask, source: SourceSlices, references: list[Dataset]) -> list[Dataset]:
    """Returns the contours of a mask, slice by slice, in LPS mm."""
    items: list[Dataset] = []
    smallest = float(np.min(source.slices[0].pixel_spacing))  # type: ignore[arg-type]  # all slices have one spacing
    digits = max(3, 3 - math.floor(math.log10(smallest)))  # a thousandth of a pixel, and of a mm
    slices, rows, columns = mask.region
    for index, plane in zip(range(slices.start, slices.stop), mask.array, strict=True):
        origin, along, down = slice_steps(source.slices[index])
        for polygon in plane_contours(plane):
            polygon = polygon + (rows.start, columns.start)
            points = origin + polygon[:, 1:] * along + polygon[:, :1] * down
            text = "\\".join([f"%.{digits}f"] * points.size) % tuple(points.ravel().tolist())
            item, image = Dataset(), Dataset()
            image.update(references[index])
            item.ContourImageSequence = [image]
            item.ContourGeometricType = "CLOSED_PLANAR"
            item.NumberOfContourPoints = len(points)
            item.ContourNumber = len(items) + 1
            # As bytes: pydicom would make an object of every number, which takes most of the time. Implicit VR stores
            # no VR, so a file holds decimal strings.
            data = text.encode() + b" " * (len(text) % 2)
            item[_CONTOUR_DATA] = DataElement(_CONTOUR_DATA, "UN", data)
            items.append(item)
    return items
