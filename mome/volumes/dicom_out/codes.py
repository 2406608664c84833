"""Codes of structures: SNOMED CT where the class table has a code, else codes of a private scheme."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mome.labels import load_table

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# A private designator begins with 99 (DICOM PS3.16 section 8.2).
PRIVATE_SCHEME = "99MOME"
PRIVATE_SCHEME_NAME = "mome class table and free text"
_ANATOMY = ("123037004", "SCT", "Anatomical structure")
_LESION = ("49755003", "SCT", "Morphologically abnormal structure")
_SIDES = {"left": ("7771000", "SCT", "Left"), "right": ("24028007", "SCT", "Right")}
_LONGEST = 64  # characters of a long string (LO)

Code = tuple[str, str, str]
"""Code value, scheme designator, meaning."""


@dataclass(frozen=True)
class StructureCodes:
    """The codes of one structure.

    Attributes:
        name: The structure's name, at most 64 characters.
        category: What kind of thing it is (DICOM PS3.16 CID 7150): an anatomical or an abnormal structure.
        type: The structure itself, without its side.
        side: The side, or None. SNOMED CT gives it as a modifier.
        remark: A sentence on a code that is not SNOMED CT, or an empty text.
    """

    name: str
    category: Code
    type: Code
    side: Code | None
    remark: str


def structure_codes(entry: dict[str, Any]) -> StructureCodes:
    """Returns the codes of a structure.

    A label that has no SNOMED CT code gets `LABEL-<id>` of the scheme 99MOME. Free text gets `TEXT-` and the first
    eight hexadecimal digits of its SHA-256, so that the same text has the same code everywhere.

    Args:
        entry: Its entry in `MaskSet.labels`.
    """
    table, name = load_table(), str(entry["name"])
    label = table[name] if name in table else None
    category = _LESION if label is not None and label.group == "lesions" else _ANATOMY
    if label is None:
        value = "TEXT-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        remark = "free text of the user; its code is of the private scheme 99MOME"
        return StructureCodes(name[:_LONGEST], category, (value, PRIVATE_SCHEME, name[:_LONGEST]), None, remark)
    words = " ".join(word for word in name.split("_") if word not in _SIDES)
    meaning = (words[:1].upper() + words[1:])[:_LONGEST]
    side = _SIDES.get(label.laterality or "")
    if label.snomed is None:
        remark = "the class table has no SNOMED CT code; the code is of the private scheme 99MOME"
        return StructureCodes(name, category, (f"LABEL-{label.id}", PRIVATE_SCHEME, meaning), side, remark)
    return StructureCodes(name, category, (label.snomed, "SCT", meaning), side, "")


def code_item(code: Code) -> Dataset:
    """Returns a code as the item of a code sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def private_scheme_item() -> Dataset:
    """Returns the item of CodingSchemeIdentificationSequence that names the private scheme."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeName = PRIVATE_SCHEME, PRIVATE_SCHEME_NAME
    return item
