"""One structure of the class table."""

from __future__ import annotations

from dataclasses import dataclass

# Anatomical groups. Neighbours in this order are related. A lesion is a tumour or a cyst; the spleen, an organ of the
# lymphatic system, counts as a gland; `other` takes what is not in the class table. Our choice.
GROUPS = (
    "bones",
    "muscles",
    "nerves",
    "airways",
    "heart",
    "vessels",
    "digestive",
    "glands",
    "urogenital",
    "lesions",
    "other",
)


@dataclass(frozen=True, kw_only=True)
class Label:
    """One structure.

    Attributes:
        id: The structure's number in multi-label masks. It never changes between versions of the table.
        name: The name in snake_case, in the spelling of TotalSegmentator v2 where that has the structure.
        synonyms: Other phrases for the same structure, in lower case.
        laterality: `left`, `right` or None.
        mirror: The name of the same structure on the other side, or None.
        snomed: The SNOMED CT code of the structure, or None where it is not known for sure. Left and right share a
            code, because SNOMED CT gives the side as a separate modifier.
        color: (red, green, blue), each from 0 to 255.
        group: The anatomical group, one of `GROUPS`.
    """

    id: int
    name: str
    synonyms: tuple[str, ...]
    laterality: str | None
    mirror: str | None
    snomed: str | None
    color: tuple[int, int, int]
    group: str = "other"
