"""The versioned class table: one entry per structure, with an id that never changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mome.labels.label import Label
from mome.labels.reading import read
from mome.labels.resolve import Resolved, resolve
from mome.labels.structures import StructureIndex
from mome.labels.vocabulary import load_vocabulary

_TABLE = Path(__file__).parent / "table.json"


class LabelTable:
    """All labels, found by name.

    Args:
        version: The version of the table.
        labels: The labels in the order of their ids.

    Raises:
        ValueError: Two labels share a phrase.
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
        """Returns every name, in the order of the ids."""
        return list(self._by_name)

    def resolve(self, prompt: str) -> Resolved:
        """Finds the label that a prompt names; see `mome.labels.resolve.resolve`.

        Raises:
            InputError: The prompt is empty.
        """
        found = resolve(prompt, self.phrases, self._index)
        name = found.names[0] if len(found.names) == 1 else None
        return Resolved(
            prompt,
            name,
            self[name] if name else None,
            found.how,
            found.warning,
            found.names,
            found.free_text,
            found.hint,
        )

    def names_of(self, text: str) -> tuple[str, ...]:
        """Returns the labels that a name, a synonym, a pair or a group stands for; no typo is corrected.

        The result is empty where the text names no label.

        Raises:
            InputError: The text is empty.
        """
        found = self.resolve(text)
        return found.names if found.how in ("exact", "synonym", "pair", "group") else ()

    def sides_of(self, text: str) -> frozenset[str]:
        """Returns the sides that the words of a text name, in full or abbreviated: `left`, `right`, both or none."""
        return read(text, self._index).sides

    @cached_property
    def _index(self) -> StructureIndex:
        return StructureIndex(self, load_vocabulary())

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain data for JSON."""
        return {"version": self.version, "labels": [asdict(label) for label in self]}


@lru_cache(maxsize=1)
def load_table() -> LabelTable:
    """Reads the class table of this version of the package; later calls return the same object."""
    raw = json.loads(_TABLE.read_text())
    labels = [
        Label(**{**entry, "synonyms": tuple(entry["synonyms"]), "color": tuple(entry["color"])})
        for entry in raw["labels"]
    ]
    return LabelTable(raw["version"], labels)
