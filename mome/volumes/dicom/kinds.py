"""What kind of image a DICOM file holds. Only CT is segmented."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mome.volumes.dicom.headers import ImageHeader
from mome.volumes.dicom.slices import Slice
from mome.volumes.not_ct import modality_not_ct

# Enhanced CT, and CT that was converted from single slices to a multi-frame file (DICOM PS3.4, table B.5-1).
MULTI_FRAME_CLASSES = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
_CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", *MULTI_FRAME_CLASSES)

# Words of ImageType for images whose values are maxima, minima or sums over slices (DICOM PS3.3 C.8.2.1.1.1).
_PROJECTIONS = ("MIP", "MINIP", "MIN_IP", "MAX_IP", "MAXIMUM", "MINIMUM", "PROJECTION IMAGE")
# Words for pictures and for values that are not HU: of the scanner's screen and renderings, and of computed images and
# materials (DICOM PS3.3 C.8.16.1.4 and C.8.15.2.1.1.1).
_NO_HU = (
    "SCREEN SAVE", "VOLUME_RENDER", "SURFACE_RENDER", "VRT", "SUBTRACTION", "DIVISION", "MULTIPLICATION",
    "STD_DEVIATION", "QUANTITY", "MAT_SPECIFIC", "MAT_FRACTIONAL", "MAT_VALUE_BASED", "EFF_ATOMIC_NUM",
    "ELECTRON_DENSITY",
)  # fmt: skip
# The same as parts of longer values, which vendors make up ("CSA MIP", "CT_SOM7 IODINE MAP"); our choice.
_PROJECTION_PARTS = ("MIP", "MINIP")
_NO_HU_PARTS = ("VRT", "IODINE", "DENSITY", "CBF", "CBV", "MTT", "TTP", "TMAX")

# Words for images of which parts were removed, or whose contrast was (our choice).
_PROCESSED = re.compile(
    r"REMOV(ED|AL)|SEGMENTED|MASKED|ERASED|SUPPRESSED|\bVNCA?\b|VIRTUAL[ _](NON[ _]?(CONTRAST|CALCIUM)|UNENHANCED)"
)
_ENERGY = re.compile(r"(\d{2,3})[ _]*KEV\b")
_MONOENERGETIC = re.compile(r"\b(MONO(E|[ -]?ENERGETIC|CHROMATIC)?|VMI)\b")


def reason_not_ct(header: ImageHeader) -> str | None:
    """Returns what an object is instead of a CT, as in "MR" or "Segmentation (SEG)", or None where it is a CT."""
    if header.sop_class and header.sop_class not in _CT_CLASSES:
        return _class_name(header)
    if header.modality not in ("CT", ""):
        return modality_not_ct(header.modality) or header.modality[:16]
    if header.samples != 1 or (header.photometric and not header.photometric.startswith("MONOCHROME")):
        return f"a colour image, {header.photometric[:16] or 'RGB'}"
    return None


def reason_not_hu(slices: Sequence[Slice]) -> str | None:
    """Returns why the values of a CT cannot be converted to HU, or None where they can.

    Spectral scanners store maps of other quantities, such as electron density, as CT; RescaleType names the quantity
    (DICOM PS3.3 C.11.1.1.2). "US" stands for an unspecified one.
    """
    projections = {
        word for image in slices for word in image.image_type if _holds(word, _PROJECTIONS, _PROJECTION_PARTS)
    }
    if projections:
        return f"it is a projection over several slices ({', '.join(sorted(projections))[:40]})"
    words = {word for image in slices for word in image.image_type if _holds(word, _NO_HU, _NO_HU_PARTS)}
    if words:
        return f"ImageType says {', '.join(sorted(words))[:60]}"
    types = {image.rescale_type for image in slices} - {"HU", "HU_MOD", "US"}
    if types:
        return f"its values are not HU but {', '.join(sorted(types))[:40]}"
    quantities = {image.header.quantity for image in slices} - {""}
    if quantities:
        return ", ".join(sorted(quantities))[:160]
    if any(image.has_lookup_table for image in slices):
        return "a lookup table instead of a slope and an intercept converts its values"
    slopes = [image.slope for image in slices if image.slope is not None]
    if 0 in slopes:
        return "its rescale slope is 0"
    return "its rescale slope is negative" if slopes and min(slopes) < 0 else None


def series_doubts(slices: Sequence[Slice]) -> list[str]:
    """Returns the doubts about all slices of a series, each once, and notes on the images.

    The notes concern processed and monoenergetic images, descriptions of projections and maps, an unspecified unit,
    and dates that differ.

    Args:
        slices: The slices; ImageType and SeriesDescription name how they were made.
    """
    notes = list(dict.fromkeys(note for image in slices for note in image.header.doubts))
    words = {word.upper() for image in slices for word in (*image.image_type, image.header.description)}
    processed = sorted(word for word in words if _PROCESSED.search(word))
    if processed:
        notes.append(
            f"the images were processed ({', '.join(processed)[:60]}): parts of the body may be removed or changed"
        )
    described = sorted({word for word in _words_of_descriptions(slices) if word in (*_PROJECTION_PARTS, *_NO_HU_PARTS)})
    if described:
        notes.append(
            f"SeriesDescription speaks of {', '.join(described)}: are the values those of single slices, and HU?"
        )
    if any(image.rescale_type == "US" for image in slices):
        notes.append("RescaleType is US, an unspecified unit: are the values HU?")
    if len({image.header.study_day for image in slices}) > 1:
        notes.append("StudyDate differs between slices: do they come from one scan?")
    if any(len(set(stated) - {""}) > 1 for stated in zip(*(image.header.person for image in slices), strict=True)):
        notes.append("the patient's name, birth date or sex differs between slices: are they of one patient?")
    energies = sorted({found[1] for word in words for found in _ENERGY.finditer(word)}, key=int)
    if energies or any(_MONOENERGETIC.search(word.replace("_", " ")) for word in words):
        at = f" at {', '.join(energies)[:20]} keV" if energies else ""
        notes.append(
            f"the images are a monoenergetic reconstruction{at}: contrast and bone have other HU than in a usual CT"
        )
    return notes


def _words_of_descriptions(slices: Sequence[Slice]) -> set[str]:
    """Returns the words of SeriesDescription of all slices, in upper case."""
    descriptions = {image.header.description.upper() for image in slices}
    return {word for description in descriptions for word in re.split(r"[^A-Z0-9]+", description)}


def _holds(value: str, values: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Says whether a value of ImageType is one of `values`, or has one of `parts` as a word."""
    upper = value.upper()
    return upper in values or any(part in parts for part in re.split(r"[^A-Z0-9]+", upper))


def _class_name(header: ImageHeader) -> str:
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    name = str(UID(header.sop_class, IGNORE).name)  # a check of the UID would print it
    if name == header.sop_class:  # The class is not in the standard.
        return f"an object of an unknown class{f' ({header.modality[:16]})' if header.modality else ''}"
    for ending in (" Storage", " Image"):
        name = name.removesuffix(ending)
    return f"{name} ({header.modality[:16]})" if header.modality and header.modality not in name else name
