"""From what a user types to a label: exact name, synonym, close match with a warning, else free text."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mome.errors import InputError

if TYPE_CHECKING:
    from mome.labels.table import Label


@dataclass(frozen=True)
class Resolved:
    """A prompt, understood.

    Attributes:
        prompt: What was typed.
        name: The label's name; None for free text.
        label: The label; None for free text.
        how: `exact`, `synonym`, `close` or `free`.
        warning: What the user should know, or None.
    """

    prompt: str
    name: str | None
    label: Label | None
    how: str
    warning: str | None


def normalise(text: str) -> str:
    """Lower case, spaces for underscores, hyphens and commas, no double spaces."""
    return " ".join(re.sub(r"[_\-,/]+", " ", text.lower()).split())


def resolve(prompt: str, phrases: dict[str, str]) -> tuple[str | None, str, str | None]:
    """(name or None, how, warning or None).

    A close match mends spelling and nothing else: word for word, and a word that the table knows stands as it is.
    So it never crosses sides, levels or numbers, and never trades one organ for another.

    Args:
        prompt: What was typed.
        phrases: Normalised phrase → name.

    Raises:
        InputError: The prompt is empty.
    """
    text = normalise(prompt)
    if not text:
        raise InputError("a prompt is empty", hint="name a structure, as in -p liver")
    if text in phrases:
        exact = normalise(phrases[text]) == text
        return phrases[text], "exact" if exact else "synonym", None
    sides = {phrases[f"{text} {side}"] for side in ("left", "right") if f"{text} {side}" in phrases}
    if sides:
        return None, "free", f"{prompt!r} has two sides: ask for {' and '.join(sorted(sides))}; read as free text"
    vocabulary = {word for phrase in phrases for word in phrase.split()}
    closeness = {phrase: _spelled_like(text.split(), phrase.split(), vocabulary) for phrase in phrases}
    best = max(closeness, key=lambda phrase: closeness[phrase])
    if closeness[best] > 0:
        name = phrases[best]
        return name, "close", f"{prompt!r} is read as {name!r}, the closest label"
    nearest = difflib.get_close_matches(text, list(phrases), n=1, cutoff=0.5)
    hint = f"; the nearest label is {phrases[nearest[0]]!r}" if nearest else ""
    return None, "free", f"{prompt!r} is not in the class table and is read as free text{hint}"


def _spelled_like(typed: list[str], known: list[str], vocabulary: set[str]) -> float:
    """0 where the words differ by more than their spelling; else how alike they are, up to 1."""
    if len(typed) != len(known):
        return 0.0
    total = 0.0
    for a, b in zip(typed, known, strict=True):
        if a == b:
            total += 1.0
            continue
        ratio = difflib.SequenceMatcher(None, a, b).ratio()
        if a in vocabulary or any(c.isdigit() for c in a + b) or len(a) < 3 or ratio < 0.75:
            return 0.0
        total += ratio
    return total / len(typed)
