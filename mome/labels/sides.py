"""The structure on the other side of the body, for structures of the class table and for others."""

from __future__ import annotations

import re

from mome.labels.table import load_table

_OPPOSITES = {"left": "right", "right": "left"}


def other_side(name: str) -> str:
    """Returns the structure on the other side; the structure itself where there is none.

    The class table says so of its structures. Another structure has a side where its name holds the word left or right.
    """
    table = load_table()
    return table[name].mirror or name if name in table else mirrored_words(name)


def has_no_other_side(name: str) -> bool:
    """Says whether a structure lies on one side only, as the right lung's middle lobe: no mirrored scan shows it."""
    table = load_table()
    return name in table and table[name].laterality is not None and table[name].mirror is None


def mirrored_words(name: str) -> str:
    """Returns a name with the words left and right exchanged; the name itself where it has neither."""
    words = re.split(r"([^A-Za-z]+)", name)
    return "".join(map(_opposite, words))


def _opposite(word: str) -> str:
    """Returns the word for the other side with the capitals of `word`; a word that names no side as it is."""
    other = _OPPOSITES.get(word.lower())
    if other is None:
        return word
    return other.upper() if word.isupper() else other.capitalize() if word.istitle() else other
