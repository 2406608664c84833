"""Typos: the distance between two spellings, and the words that a misspelt word may stand for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

# A typo is one edit, or two where both words have at least this many letters (our choice).
_LONG_WORD = 8
# Shorter words are not corrected: too many of them are one letter apart ("lien" and "line").
_SHORTEST_TYPED, _SHORTEST_KNOWN = 4, 5


@lru_cache(maxsize=4096)
def edit_distance(a: str, b: str) -> int:
    """Returns the number of letters to insert, delete, replace, or swap with their neighbour, to turn `a` into `b`.

    This is the optimal string alignment distance (Damerau, CACM 1964).
    """
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def corrections(typed: str, known: Iterable[str]) -> list[str]:
    """Returns the known words that `typed` may be a typo of, the nearest ones only.

    The first letter must agree: typos rarely change it, while different organs often differ in it alone
    ("carotid" and "parotid").
    """
    distances = _distances(typed, known)
    allowed = {word: distance for word, distance in distances.items() if distance <= _allowed(typed, word)}
    nearest = min(allowed.values(), default=0)
    return [word for word, distance in allowed.items() if distance == nearest]


def rivals(typed: str, known: Iterable[str], terms: Iterable[str]) -> list[str]:
    """Returns the words that make a correction of `typed` uncertain, the corrections themselves included.

    Args:
        typed: The misspelt word.
        known: Words of labels. One rivals the nearest one where it is at most one edit further away, and two at most.
        terms: Other terms of anatomy. One rivals the nearest label where it is at least as near.
    """
    distances = _distances(typed, known)
    nearest = min((d for word, d in distances.items() if d <= _allowed(typed, word)), default=0)
    if not nearest:
        return []
    found = [word for word, distance in distances.items() if distance <= nearest + 1]
    return found + [word for word, distance in _distances(typed, terms).items() if distance <= nearest]


def _allowed(typed: str, word: str) -> int:
    return 2 if min(len(typed), len(word)) >= _LONG_WORD else 1


def _distances(typed: str, known: Iterable[str]) -> dict[str, int]:
    """Returns the distances of `typed` from the known words that are at most two edits away."""
    if len(typed) < _SHORTEST_TYPED or not typed.isalpha():
        return {}
    distances: dict[str, int] = {}
    for word in known:
        if len(word) < _SHORTEST_KNOWN or word[0] != typed[0] or abs(len(word) - len(typed)) > 2:
            continue
        distance = edit_distance(typed, word)
        if distance <= 2:
            distances[word] = distance
    return distances


def is_misspelt_side(typed: str, side: str) -> bool:
    """Whether `typed` is one edit away from `side`, which is a word such as "left"."""
    return len(typed) >= len(side) - 1 and abs(len(typed) - len(side)) <= 1 and edit_distance(typed, side) == 1
