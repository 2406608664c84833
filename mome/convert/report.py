"""What a conversion took from a file, left random and did not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """The account of a conversion; it is printed, and stored as conversion.json.

    Attributes:
        family: The family of the file, as in "ct-fm".
        source: The file.
        matched: Names of the model's tensors that come from the file, or follow from it.
        random: Names of the model's tensors that are new and untrained.
        unused: Names of the file's tensors that the model has no place for.
        notes: Sentences that the user should know.
    """

    family: str
    source: str
    matched: tuple[str, ...]
    random: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Returns the lines to print: how many tensors of each part, and the notes."""
        rows = [
            ("matched", self.matched, "of the model come from the file"),
            ("random", self.random, "of the model are new and untrained"),
            ("not used", self.unused, "of the file have no place in the model"),
        ]
        lines = [f"{name:<9}{len(keys):>4} tensors {text}{_parts(keys)}" for name, keys, text in rows]
        return lines + [f"note: {note}" for note in self.notes]


def _parts(keys: Iterable[str], depth: int = 3) -> str:
    """The parts that tensors belong to, with their numbers, as in ": head 6, fusion 2"."""
    counts = Counter(".".join(key.split(".")[:-1][:depth]) or key for key in keys)
    if len(counts) > 12:
        return _parts(keys, depth - 1) if depth > 1 else f": {len(counts)} parts"
    return ": " + ", ".join(f"{part} {count}" for part, count in counts.items()) if counts else ""
