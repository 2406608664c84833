"""Headers of the source series for a DICOM object that refers to it, and the masks at its slices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mome.errors import InputError
from mome.volumes.boxes import Box, bounding_box
from mome.volumes.dicom.bounded import BoundedFile
from mome.volumes.dicom.files import folder_files
from mome.volumes.dicom.quiet import quiet_decoders
from mome.volumes.dicom.slices import Slice
from mome.volumes.dicom.source import SOURCE_KEY, SourceSlices
from mome.volumes.grid import Volume
from mome.volumes.mask_set import MaskSet
from mome.volumes.scan_files import has_dicom_prefix, scan_ending

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Elements of type 2 that a derived object copies: present, and empty where the source has no value.
_COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_EMPTY_WHERE_MISSING = (*_COPIED, "PositionReferenceIndicator")
# What an object of the patient's study copies.
PATIENT_AND_STUDY = (
    *_COPIED,
    "StudyInstanceUID",
    "StudyDescription",
    "IssuerOfPatientID",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
)
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_DATE, _TIME = re.compile(r"\d{8}"), re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")


def check_is_series(source: Path | None, what: str) -> None:
    """Checks that a scan is DICOM by its path, and that a file of it has the UIDs by which others refer to it.

    Args:
        source: The scan's file or folder; None where it was passed as an array.
        what: The format in messages, as in "a DICOM SEG".

    Raises:
        InputError: It is a file of another format, or an array; or no file of the folder has all UIDs.
    """
    if source is None or (scan_ending(source) is not None and not source.is_dir()):
        raise _no_series(source, what)
    files = [path for path in (folder_files(source) if source.is_dir() else [source]) if has_dicom_prefix(path)]
    missing = ""
    for path in files:
        try:
            missing = missing_uid(_read(path, list(_REQUIRED)))
        except InputError:  # a damaged file; the reader names it
            continue
        if not missing:
            return
    if missing:
        raise _without_uid(missing, source)


def check_can_be_referred_to(volume: Volume, what: str) -> None:
    """Checks that the slices of a scan, which was read, have the UIDs by which a derived object refers to them.

    Args:
        volume: The scan.
        what: The format in messages, as in "a DICOM SEG".

    Raises:
        InputError: The scan was not read from DICOM, a UID is missing, or slices share one.
    """
    source = volume.header.get(SOURCE_KEY)
    if not isinstance(source, SourceSlices):
        raise _no_series(None, what)
    source_header(source)
    instance_uids(source)


def missing_uid(header: Dataset) -> str:
    """Returns the keyword of a UID that a header lacks and a derived object refers to, or an empty text."""
    return next((keyword for keyword in _REQUIRED if not str(header.get(keyword) or "").strip()), "")


def source_slices(masks: MaskSet, what: str) -> SourceSlices:
    """Returns the slices that the masks' scan was read from.

    Raises:
        InputError: The scan was not read from DICOM.
    """
    found = masks.header.get(SOURCE_KEY)
    if not isinstance(found, SourceSlices):
        raise _no_series(masks.source, what)
    if tuple(masks.grid.shape) != found.shape:
        raise ValueError(f"masks of shape {masks.grid.shape} for a series of {found.shape}")
    return found


@dataclass(frozen=True)
class SlicedMask:
    """A mask at the source slices, inside of the box that holds it.

    Attributes:
        region: The box: ranges of slices, rows and columns.
        array: (slices, rows, columns) of bool.
    """

    region: Box
    array: np.ndarray


def mask_at_slices(masks: MaskSet, structure: str, source: SourceSlices) -> SlicedMask:
    """Returns a mask at the source slices.

    Where planes were interpolated between slices, each slice gets the plane that is closest to it.

    Args:
        masks: The masks.
        structure: The name of one of them.
        source: The slices.
    """
    boxed = masks.boxed(structure)
    values = boxed.values.view(bool)
    planes = source.planes() - boxed.first[2]
    inside = np.flatnonzero((planes >= 0) & (planes < values.shape[2]))
    array = values[:, :, planes[inside]].transpose(2, 1, 0)
    start = (int(inside[0]) if inside.size else 0, boxed.first[1], boxed.first[0])
    box = bounding_box(array)
    region = tuple(slice(at + side.start, at + side.stop) for at, side in zip(start, box, strict=True))
    return SlicedMask((region[0], region[1], region[2]), array[box])


def resampled_note(masks: MaskSet, source: SourceSlices) -> list[str]:
    """Returns a sentence where the masks' planes are not the source slices."""
    if source.is_regular:
        return []
    far = source.farthest()
    away = f", which are up to {far:.2g} mm away" if far > 0.06 else ""
    return [
        f"the series has {len(source.slices)} slices at irregular steps: the file holds the masks at these slices, not "
        f"at the {source.shape[2]} planes of the volume{away}"
    ]


def empty_note(structures: Sequence[str], what: str) -> list[str]:
    """Returns a sentence on structures whose masks have voxels, and none at a source slice; none where there are none.

    Args:
        structures: Their names.
        what: The file in the sentence, as in "the SEG".
    """
    return [f"no voxel at a source slice, so {what} holds nothing of: {', '.join(structures)}"] if structures else []


def source_header(source: SourceSlices) -> Dataset:
    """Returns the header of the first slice's file, without pixels, with empty values for what it lacks.

    Raises:
        InputError: The file is gone, is now of another series, or has no UID of its study, series or frame of
            reference.
    """
    first = source.slices[0].header
    dataset = _read(first.file)
    if str(dataset.get("SeriesInstanceUID") or "") != first.series_uid:
        raise _changed(first.file)
    missing = missing_uid(dataset)
    if missing:
        raise _without_uid(missing, first.file.parent)
    for keyword in _EMPTY_WHERE_MISSING:
        value = str(dataset.get(keyword) or "").strip()
        if keyword == "PatientSex" and value not in ("M", "F", "O"):
            value = ""
        if keyword.endswith("Date") and not _DATE.fullmatch(value):
            value = ""
        if keyword.endswith("Time") and not _TIME.fullmatch(value):
            value = ""
        if not value:
            setattr(dataset, keyword, "")
    return dataset


def instance_uids(source: SourceSlices) -> list[tuple[str, str]]:
    """Returns (SOPClassUID, SOPInstanceUID) of the file of every slice.

    Raises:
        InputError: A file is gone or has no SOPInstanceUID, or two files have the same one.
    """
    of_file: dict[Path, tuple[str, str]] = {}
    for image in source.slices:
        file = image.header.file
        if file not in of_file:
            dataset = _read(file, ["SOPClassUID", "SOPInstanceUID"])
            of_file[file] = (str(dataset.get("SOPClassUID") or ""), str(dataset.get("SOPInstanceUID") or ""))
    uids = [uid for _, uid in of_file.values()]
    if not all(sop_class and uid for sop_class, uid in of_file.values()) or len(set(uids)) < len(uids):
        raise InputError(
            "slices of the series have no SOPInstanceUID, or share one, so nothing can refer to them",
            where=str(source.slices[0].header.file.parent),
            hint="export the series again, or write NIfTI: --writer nifti",
        )
    return [of_file[image.header.file] for image in source.slices]


def slice_steps(image: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where a slice lies by its own header, LPS mm: the first pixel, the step along a row, along a column."""
    assert image.position is not None and image.orientation is not None and image.pixel_spacing is not None
    between_rows, between_columns = image.pixel_spacing
    return image.position, image.orientation[:3] * between_columns, image.orientation[3:] * between_rows


def _read(path: Path, keywords: list[str] | None = None) -> Any:
    """Reads the header of a file that was read before.

    Raises:
        InputError: It is gone, or was changed and cannot be read any more.
    """
    import pydicom

    try:
        with quiet_decoders(), BoundedFile(path) as file:
            return pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=keywords)
    except Exception as error:  # pydicom raises errors of many types for damaged files
        raise _changed(path) from error


def _changed(path: Path) -> InputError:
    return InputError("the series has changed or is gone since it was read", where=str(path), hint="segment it again")


def _no_series(source: Path | None, what: str) -> InputError:
    return InputError(
        f"{what} refers to the slices of a DICOM series, and this scan is none",
        where=None if source is None else str(source),
        hint="give the folder of the DICOM series, or write NIfTI: --writer nifti",
    )


def _without_uid(keyword: str, where: Path) -> InputError:
    return InputError(
        f"the series has no {keyword}, so nothing can refer to it",
        where=str(where),
        hint="export the series again with its UIDs, or write NIfTI: --writer nifti",
    )
