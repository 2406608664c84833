"""DICOM objects that lie in a folder already: which series they are of, and whether they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mome.volumes.dicom.bounded import BoundedFile
from mome.volumes.dicom.elements import is_short
from mome.volumes.dicom.quiet import quiet_decoders

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_FRAMES, _STUDIES, _SERIES = (
    "ReferencedFrameOfReferenceSequence",
    "RTReferencedStudySequence",
    "ReferencedSeriesSequence",
)
# Modality → the last of the elements without which an object of this kind holds nothing.
_CONTENT = {"SEG": "PixelData", "RTSTRUCT": "RTROIObservationsSequence"}


def referenced_series(path: Path) -> set[str] | None:
    """Returns the SeriesInstanceUIDs that a DICOM SEG or an RT Structure Set refers to; no pixel is read.

    It is empty where the file is a DICOM object of another kind, and None where it cannot be read as DICOM or is cut
    off before its references.
    """
    import pydicom

    try:
        with quiet_decoders(), BoundedFile(path) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Modality", _FRAMES, _SERIES])
        series = list(_items(header, _SERIES))
        for frame in _items(header, _FRAMES):
            for study in _items(frame, _STUDIES):
                series += _items(study, "RTReferencedSeriesSequence")
        found = {uid for item in series if (uid := str(item.get("SeriesInstanceUID") or "").strip())}
        is_cut_off = not found and str(header.get("Modality") or "") in ("", "SEG", "RTSTRUCT")
        return None if is_cut_off else found
    except Exception:  # pydicom raises errors of many types for damaged files
        return None


def is_whole_object(path: Path) -> bool:
    """Says whether a file is a DICOM object that can be read to its end; the rest of one that was cut off is missing.

    Args:
        path: A file whose ending is that of DICOM.
    """
    import pydicom

    try:
        with quiet_decoders(), BoundedFile(path) as file:
            read = pydicom.dcmread(file)
            is_cut_off = any(is_short(read.get_item(tag)) for tag in read.keys())  # before values are converted
            modality = str(read.get("Modality") or "")
            return bool(modality) and not is_cut_off and _CONTENT.get(modality, "Modality") in read
    except Exception:  # pydicom raises errors of many types for damaged files
        return False


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    return list(dataset.get(keyword) or [])
