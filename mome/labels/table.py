"""The versioned class table: one entry per structure, with an id that never changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mome.labels.resolve import Resolved, resolve

_TABLE = Path(__file__).parent / "table.json"


@dataclass(frozen=True, kw_only=True)
class Label:
    """One structure.

    Attributes:
        id: Number in multi-label masks; stable across versions.
        name: snake_case; TotalSegmentator v2's spelling where it has the structure.
        synonyms: Other ways to say it, lower case.
        laterality: `left`, `right` or None.
        mirror: Name of the same structure on the other side, or None.
        snomed: SNOMED CT code of the structure, None where it is not known for sure. Sides share a code: the side
            is a modifier there.
        color: (r, g, b), 0…255.
    """

    id: int
    name: str
    synonyms: tuple[str, ...]
    laterality: str | None
    mirror: str | None
    snomed: str | None
    color: tuple[int, int, int]


class LabelTable:
    """All labels by name.

    Args:
        version: Of the table.
        labels: In the order of their ids.
    """

    def __init__(self, version: int, labels: list[Label]) -> None:
        self.version = version
        self._by_name = {label.name: label for label in labels}
        self.phrases: dict[str, str] = {}
        for label in labels:
            for phrase in (label.name.replace("_", " ").lower(), *label.synonyms):
                owner = self.phrases.setdefault(phrase, label.name)
                if owner != label.name:
                    raise ValueError(f"{phrase!r} names both {owner} and {label.name}")

    def __getitem__(self, name: str) -> Label:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Label]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def names(self) -> list[str]:
        """Every name, in the order of the ids."""
        return list(self._by_name)

    def resolve(self, prompt: str) -> Resolved:
        """What a user means: see `mome.labels.resolve`."""
        name, how, warning = resolve(prompt, self.phrases)
        return Resolved(prompt, name, self[name] if name else None, how, warning)

    def to_json(self) -> dict[str, Any]:
        """The table as plain data."""
        return {"version": self.version, "labels": [asdict(label) for label in self]}


@lru_cache(maxsize=1)
def load_table() -> LabelTable:
    """The class table of this version of the package."""
    raw = json.loads(_TABLE.read_text())
    labels = [
        Label(**{**entry, "synonyms": tuple(entry["synonyms"]), "color": tuple(entry["color"])})
        for entry in raw["labels"]
    ]
    return LabelTable(raw["version"], labels)
