"""DICOM series written with pydicom, and an independent check of where a volume puts their slices.

The HU of every slice are a linear function of the place in the world, which linear interpolation keeps. So a volume is
right where its values are this function of the places that its affine gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
AXIAL = (1, 0, 0, 0, 1, 0)
SAGITTAL = (0, 1, 0, 0, 0, -1)
ROWS, COLUMNS = 12, 10
SPACING = (2.0, 1.5)  # between rows, between columns
GRADIENT = np.array([4.0, -3.0, 5.0])  # HU per mm along LPS x, y, z


def tilted(degrees: float) -> tuple[float, ...]:
    angle = np.radians(degrees)
    return (1, 0, 0, 0, float(np.cos(angle)), float(np.sin(angle)))


def along_z(heights: Any, start: tuple[float, float, float] = (-7.25, -11.5, 20.0)) -> np.ndarray:
    """Positions (n, 3) at the given heights above `start`."""
    return np.asarray(start) + np.asarray(heights, dtype=float)[:, None] * (0, 0, 1)


def hu_at(points: np.ndarray) -> np.ndarray:
    """HU at LPS points (…, 3)."""
    return points @ GRADIENT + 40


def slice_hu(position: Any, orientation: Any, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """HU (rows, columns) of a slice."""
    row, column = np.reshape(orientation, (2, 3))
    j, i = np.mgrid[:rows, :columns]
    points = np.asarray(position) + i[..., None] * SPACING[1] * row + j[..., None] * SPACING[0] * column
    return hu_at(points)


def dataset(position: Any, orientation: Any = AXIAL, hu: np.ndarray | None = None, **changes: Any) -> FileDataset:
    """One CT slice. A change of None removes the element."""
    hu = slice_hu(position, orientation) if hu is None else hu
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = changes.get("SOPClassUID") or CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    elements = {
        "SOPClassUID": CT,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientName": "Doe^Jane",
        "PatientID": "MRN-44871",
        "PatientBirthDate": "19610203",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "SeriesNumber": 2,
        "SeriesDescription": "Thorax 2.0",
        "InstanceNumber": 1,
        "ImagePositionPatient": [float(v) for v in position],
        "ImageOrientationPatient": [float(v) for v in orientation],
        "PixelSpacing": list(SPACING),
        "SliceThickness": 3,
        "Rows": hu.shape[0],
        "Columns": hu.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        **changes,
    }
    for keyword, value in elements.items():
        if value is not None:
            setattr(made, keyword, value)
    slope, intercept = float(elements["RescaleSlope"] or 1), float(elements["RescaleIntercept"] or 0)
    made.PixelData = np.round((hu - intercept) / slope).astype("<i2").tobytes()
    return made


def write(folder: Path, slices: list[FileDataset], ending: str = ".dcm") -> Path:
    """Writes slices as files, numbered against their order in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(list(folder.iterdir()))
    for number, image in enumerate(slices):
        image.save_as(folder / f"{count + len(slices) - number:03d}{ending}", enforce_file_format=True)
    return folder


def series(positions: np.ndarray, orientation: Any = AXIAL, **changes: Any) -> list[FileDataset]:
    return [dataset(p, orientation, InstanceNumber=n + 1, **changes) for n, p in enumerate(positions)]


def enhanced(positions: np.ndarray, orientation: Any = AXIAL, order: Any = None, **changes: Any) -> FileDataset:
    """An enhanced CT whose frames are in the given order."""
    order = list(range(len(positions))) if order is None else list(order)
    hu = np.concatenate([slice_hu(positions[k], orientation) for k in order])
    made = dataset(positions[0], orientation, hu, SOPClassUID=ENHANCED_CT, **changes)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(made, keyword)
    del made.RescaleIntercept
    made.Rows, made.NumberOfFrames = ROWS, len(order)
    shared, measures, rescale, turned = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 3
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    turned.ImageOrientationPatient = [float(v) for v in orientation]
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    shared.PlaneOrientationSequence = Sequence([turned])
    made.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for k in order:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [float(v) for v in positions[k]]
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    made.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return made


def largest_error(affine: np.ndarray, positions: np.ndarray, orientation: Any = AXIAL, on_planes: bool = True) -> float:
    """Returns the largest distance, in mm, between corners of slices by their headers and by an affine.

    Args:
        affine: (4, 4) of a volume or a mask, from (column, row, plane) to RAS mm.
        positions: (n, 3) ImagePositionPatient of every slice.
        orientation: ImageOrientationPatient.
        on_planes: Compare with the nearest plane; else with the place between planes.
    """
    row, column = np.reshape(orientation, (2, 3))
    worst = 0.0
    for position in positions:
        for i in (0, COLUMNS - 1):
            for j in (0, ROWS - 1):
                corner = np.asarray(position) + i * SPACING[1] * row + j * SPACING[0] * column
                corner = corner * (-1, -1, 1)
                plane = (np.linalg.inv(affine) @ [*corner, 1])[2]
                plane = round(plane) if on_planes else plane
                worst = max(worst, float(np.linalg.norm((affine @ [i, j, plane, 1])[:3] - corner)))
    return worst


def largest_hu_error(array: np.ndarray, affine: np.ndarray) -> float:
    """Returns the largest difference between values and the function of the world that `slice_hu` writes."""
    at = np.stack(np.meshgrid(*map(np.arange, array.shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return float(np.abs(array - hu_at(at * (-1, -1, 1))).max())
