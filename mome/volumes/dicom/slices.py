"""Slices of a series: where each lies and how its values become HU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mome.volumes.dicom.damaged import DamagedFile
from mome.volumes.dicom.elements import number, numbers, printable, texts
from mome.volumes.dicom.headers import ImageHeader


@dataclass(frozen=True)
class Slice:
    """One slice: a file, or a frame of a multi-frame file. What the header lacks is None.

    Attributes:
        header: The header of its file.
        frame: Index of the frame in the file, from 0.
        position: (3,) ImagePositionPatient: the centre of the first pixel, LPS mm.
        orientation: (6,) ImageOrientationPatient: the directions of a row and of a column.
        pixel_spacing: (2,) The distance between rows and between columns in mm.
        thickness: SliceThickness in mm.
        slice_spacing: SpacingBetweenSlices in mm.
        location: SliceLocation in mm.
        gantry_tilt: GantryDetectorTilt in degrees.
        diameter: ReconstructionDiameter in mm.
        slope: RescaleSlope.
        intercept: RescaleIntercept.
        has_rescale: Whether the header gives RescaleSlope or RescaleIntercept, valid or not.
        rescale_type: RescaleType, "HU" where it is missing.
        has_lookup_table: Whether a table, not a slope, converts the stored values.
        image_type: ImageType of the file or FrameType of the frame.
        order: Sorts slices at one place by acquisition, time point and instance number.
        attributes: Attribute → value of those by which acquisitions, phases and reconstructions differ.
    """

    header: ImageHeader
    frame: int
    position: np.ndarray | None = field(compare=False)
    orientation: np.ndarray | None = field(compare=False)
    pixel_spacing: np.ndarray | None = field(compare=False)
    thickness: float | None
    slice_spacing: float | None
    location: float | None
    gantry_tilt: float | None
    diameter: float | None
    slope: float | None
    intercept: float | None
    has_rescale: bool
    rescale_type: str
    has_lookup_table: bool
    image_type: tuple[str, ...]
    order: tuple[float, ...]
    attributes: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """The file's name, with the number of the frame where the file has several."""
        return printable(self.header.file.name, 200) + (f" frame {self.frame}" if self.header.frames > 1 else "")

    @property
    def is_localizer(self) -> bool:
        """Whether the image is a localizer (scout) by its type."""
        return "LOCALIZER" in self.image_type

    @property
    def missing_geometry(self) -> str | None:
        """The attribute without which the place of the slice is unknown, or None."""
        if self.position is None:
            return "ImagePositionPatient"
        if self.orientation is None:
            return "ImageOrientationPatient"
        return "PixelSpacing" if self.pixel_spacing is None else None


def slices_of(header: ImageHeader, dataset: Any) -> list[Slice]:
    """Returns the slices of a CT file: one, or one per frame of a multi-frame file.

    A multi-frame file keeps its geometry in functional groups, which are sequences per frame or for all frames (DICOM
    PS3.3 C.7.6.16).

    Raises:
        DamagedFile: A multi-frame file does not describe each of its frames, or an element cannot be read.
    """
    try:
        return _all_slices(header, dataset)
    except DamagedFile:
        raise
    except Exception as error:  # pydicom converts elements when they are used, with errors of many types
        raise DamagedFile("its header cannot be read") from error


def _all_slices(header: ImageHeader, dataset: Any) -> list[Slice]:
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if header.frames != max(1, len(per_frame)):
        raise DamagedFile(f"its header describes {len(per_frame)} of {header.frames} frames")
    return [
        _slice(header, dataset, frame, [per_frame[frame] if per_frame else None, shared])
        for frame in range(header.frames)
    ]


def _slice(header: ImageHeader, dataset: Any, frame: int, groups: list[Any]) -> Slice:
    def part(name: str) -> Any:
        """Returns a functional group of the frame, else of all frames, else the file's own elements."""
        owner = next((group for group in groups if group is not None and group.get(name)), None)
        return dataset if owner is None else owner[name].value[0]

    content, rescale = part("FrameContentSequence"), part("PixelValueTransformationSequence")
    measures, cardiac = part("PixelMeasuresSequence"), part("CardiacSynchronizationSequence")
    thickness = number(measures, "SliceThickness")
    image_type = texts(part("CTImageFrameTypeSequence").get("FrameType") or dataset.get("ImageType"))
    attributes: dict[str, Any] = {
        "AcquisitionNumber": _first(number(content, "FrameAcquisitionNumber"), number(dataset, "AcquisitionNumber")),
        "TemporalPositionIdentifier": _first(
            number(content, "TemporalPositionIndex"), number(dataset, "TemporalPositionIdentifier")
        ),
        "NominalPercentageOfCardiacPhase": number(cardiac, "NominalPercentageOfCardiacPhase"),
        "ImageType": image_type or None,
        "KVP": number(dataset, "KVP"),
        "SliceThickness": None if thickness is None else round(thickness, 1),
        "SeriesNumber": header.series_number,
        "TriggerTime": _first(number(cardiac, "NominalCardiacTriggerDelayTime"), number(dataset, "TriggerTime")),
        "AcquisitionTime": _first(number(content, "FrameAcquisitionDateTime"), number(dataset, "AcquisitionTime")),
        "ContentTime": number(dataset, "ContentTime"),
        "InstanceNumber": number(dataset, "InstanceNumber"),
        "frame": float(frame),
    }
    sorted_by = ("AcquisitionNumber", "TemporalPositionIdentifier", "ContentTime", "InstanceNumber", "frame")
    return Slice(
        header=header,
        frame=frame,
        position=numbers(part("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=_orientation(part("PlaneOrientationSequence")),
        pixel_spacing=_pixel_spacing(measures),
        thickness=thickness,
        slice_spacing=number(measures, "SpacingBetweenSlices"),
        location=number(dataset, "SliceLocation") if header.frames == 1 else None,
        gantry_tilt=number(part("CTAcquisitionDetailsSequence"), "GantryDetectorTilt"),
        diameter=number(part("CTReconstructionSequence"), "ReconstructionDiameter"),
        slope=number(rescale, "RescaleSlope"),
        intercept=number(rescale, "RescaleIntercept"),
        has_rescale=rescale.get("RescaleSlope") is not None or rescale.get("RescaleIntercept") is not None,
        rescale_type=printable(rescale.get("RescaleType") or "HU").upper(),
        has_lookup_table=bool(dataset.get("ModalityLUTSequence")),
        image_type=image_type,
        order=tuple(float(attributes[name] or 0) for name in sorted_by),
        attributes=attributes,
    )


def _first(*values: float | None) -> float | None:
    """Returns the first value that is given."""
    return next((value for value in values if value is not None), None)


def _orientation(dataset: Any) -> np.ndarray | None:
    """Returns the two directions as unit vectors; None where they are not perpendicular or of length 1 within 1 %."""
    values = numbers(dataset, "ImageOrientationPatient", 6)
    if values is None:
        return None
    row, column = values[:3], values[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(row @ column) > 0.01:
        return None
    return np.concatenate([row / lengths[0], column / lengths[1]])


def _pixel_spacing(dataset: Any) -> np.ndarray | None:
    values = numbers(dataset, "PixelSpacing", 2)
    # Outside these limits, in mm, no CT has its pixels, and products of spacings underflow or overflow.
    return None if values is None or values.min() < 1e-3 or values.max() > 1e3 else values
