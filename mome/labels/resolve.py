"""Maps what a user types to a label: an exact name, a synonym, a corrected typo, or else free text."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mome.errors import InputError
from mome.labels.label import Label

# Words of one or two letters ("L3", "T1") differ too little for a typo to be told from another word.
_SHORTEST_CORRECTED = 3
# Lowest `difflib` ratio at which two words count as spellings of the same word (our choice).
_LOWEST_RATIO = 0.75


@dataclass(frozen=True)
class Resolved:
    """A prompt after the class table was searched for it.

    Attributes:
        prompt: The text that the user typed.
        name: The label's name, or None for free text.
        label: The label, or None for free text.
        how: `exact`, `synonym`, `close` (a typo was corrected) or `free`.
        warning: A sentence for the user, or None.
    """

    prompt: str
    name: str | None
    label: Label | None
    how: str
    warning: str | None


def normalise(text: str) -> str:
    """Returns `text` in lower case, with single spaces in place of underscores, hyphens, commas and slashes."""
    return " ".join(re.sub(r"[_\-,/]+", " ", text.lower()).split())


def resolve(prompt: str, phrases: dict[str, str]) -> tuple[str | None, str, str | None]:
    """Finds the label that a prompt names; returns (name or None, how, warning or None), see `Resolved`.

    Only typos are corrected, word by word. A word in the vocabulary is never changed, so sides, vertebral levels,
    numbers and organs cannot be swapped.

    Args:
        prompt: The text that the user typed.
        phrases: Normalised phrase → label name.

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
    similarity = {phrase: _typo_similarity(text.split(), phrase.split(), vocabulary) for phrase in phrases}
    best = max(similarity, key=lambda phrase: similarity[phrase])
    if similarity[best] > 0:
        name = phrases[best]
        return name, "close", f"{prompt!r} is read as {name!r}, the closest label"
    nearest = difflib.get_close_matches(text, list(phrases), n=1, cutoff=0.5)
    hint = f"; the nearest label is {phrases[nearest[0]]!r}" if nearest else ""
    return None, "free", f"{prompt!r} is not in the class table and is read as free text{hint}"


def _typo_similarity(typed: list[str], known: list[str], vocabulary: set[str]) -> float:
    """Returns the mean similarity of the words, up to 1, or 0 where they differ by more than typos."""
    if len(typed) != len(known):
        return 0.0
    total = 0.0
    for a, b in zip(typed, known, strict=True):
        if a == b:
            total += 1.0
            continue
        ratio = difflib.SequenceMatcher(None, a, b).ratio()
        has_digit = any(c.isdigit() for c in a + b)
        if a in vocabulary or has_digit or len(a) < _SHORTEST_CORRECTED or ratio < _LOWEST_RATIO:
            return 0.0
        total += ratio
    return total / len(typed)
