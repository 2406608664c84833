"""What headers state of their images beside geometry: other quantities than HU, and reasons to doubt the images.

Sources: DICOM PS3.3 C.7.6.16.2.11 (real-world values), C.7.6.3.1 (intensity relationship), C.8.9.1 (units of PET),
C.7.1.1 (species), C.7.6.1 (annotations) and C.8.2.1.1.1 (image types). Words of vendors are our choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mome.volumes.dicom.elements import number, printable, texts

# Attributes that this module reads.
STATEMENTS = (
    "RealWorldValueMappingSequence",
    "PixelIntensityRelationship",
    "Units",
    "BurnedInAnnotation",
    "PatientSpeciesDescription",
    "PatientSpeciesCodeSequence",
    "ManufacturerModelName",
    "ScanOptions",
    "ProtocolName",
)
# The code of HU in UCUM, which DICOM uses for units.
_HU_UNITS = ("[hnsf'u]", "hu", "hounsfield unit", "hounsfield units")
_HUMAN = ("", "human", "homo sapiens", "human being", "person", "man")
# kV: scanners use 70 to 150.
_KILOVOLTS = (40.0, 300.0)
_CONE_BEAM = re.compile(
    r"CBCT|CONE[ _-]?BEAM|DVT\b|ON[ -]BOARD IMAGER|\bOBI\b|\bXVI\b|I-?CAT\b|NEWTOM|PROMAX|ORTHOPHOS|ACCUITOMO|VERAVIEW"
)


def other_quantity(dataset: Any) -> str:
    """Returns what a header says that values are instead of HU, as the end of a sentence; empty where it says nothing.

    Args:
        dataset: The header, as pydicom read it.
    """
    units = {unit for unit in _real_world_units(dataset) if unit}
    if units and not any(unit.lower() in _HU_UNITS for unit in units):
        return f"RealWorldValueMappingSequence gives values in {', '.join(sorted(units))[:40]}"
    relationship = printable(dataset.get("PixelIntensityRelationship")).upper()
    if relationship in ("LOG", "DISP"):
        return f"PixelIntensityRelationship is {relationship}, so values are no linear function of HU"
    pet_units = printable(dataset.get("Units")).upper()
    if pet_units and pet_units.lower() not in _HU_UNITS:
        return f"Units is {pet_units[:16]}, which PET has"
    return ""


def header_doubts(dataset: Any) -> tuple[str, ...]:
    """Returns notes on what a header says of its images.

    Args:
        dataset: The header, as pydicom read it.
    """
    notes = []
    kilovolts = number(dataset, "KVP")
    if kilovolts is not None and not _KILOVOLTS[0] <= kilovolts <= _KILOVOLTS[1]:
        notes.append(f"KVP is {kilovolts:.4g} kV, which no CT scanner of patients uses: is the header right?")
    if printable(dataset.get("BurnedInAnnotation")).upper() == "YES":
        notes.append("BurnedInAnnotation is YES: text may be drawn into the images, and it has no HU")
    if _species(dataset).lower() not in _HUMAN:
        notes.append("PatientSpeciesDescription names an animal; models are trained on people")
    if any(_CONE_BEAM.search(word) for word in _words(dataset)):
        notes.append("the header speaks of cone-beam CT, whose values may be tens to hundreds of HU from true HU")
    return tuple(notes)


def _real_world_units(dataset: Any) -> Iterator[str]:
    """Yields the codes of the units of all real-world value mappings of a header and its functional groups."""
    owners = [dataset]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        owners += list(dataset.get(name) or [])
    for owner in owners:
        for mapping in owner.get("RealWorldValueMappingSequence") or []:
            for unit in mapping.get("MeasurementUnitsCodeSequence") or []:
                yield printable(unit.get("CodeValue") or unit.get("CodeMeaning"))


def _species(dataset: Any) -> str:
    codes = dataset.get("PatientSpeciesCodeSequence") or []
    coded = next((printable(code.get("CodeMeaning")) for code in codes if code.get("CodeMeaning")), "")
    return printable(dataset.get("PatientSpeciesDescription")) or coded


def _words(dataset: Any) -> Iterator[str]:
    """Yields the texts of a header that name the scanner and the technique, in upper case.

    SeriesDescription may hold a name; nothing of these texts is shown.
    """
    for keyword in ("ManufacturerModelName", "ScanOptions", "ImageType", "ProtocolName", "SeriesDescription"):
        yield from texts(dataset.get(keyword))
