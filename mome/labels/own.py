"""Structures of a user's own, which a run trains beside those of the class table.

A structure has a name, as in `thymus`, and may have other words for it. `plaque_left` and `plaque_right` are two sides
of one structure, because their names differ by the side alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from mome.errors import InputError
from mome.labels.all_labels import asks_all
from mome.labels.characters import LONGEST_PROMPT, unreadable
from mome.labels.sides import mirrored_words
from mome.labels.table import load_table
from mome.labels.tokens import normalise

_NAME = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*")
_LONGEST_NAME = 60  # a name is part of the names of mask files
_RESERVED = ("background", "ignore", "left", "right")
_HINT = "structures: {thymus: [thymic gland]}"


def read_own_structures(given: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    """Returns structure → other words for it.

    Args:
        given: Name → a list of other words, one of them as a text, or None.

    Raises:
        InputError: A name is not made of letters, digits and underscores, or abbreviates a side; other words are no
            texts; or two structures, one of which may be in the class table, share a name.
    """
    found: dict[str, tuple[str, ...]] = {}
    of_phrase: dict[tuple[str, ...], str] = {}
    for name, words in given.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise InputError(
                f"a structure's name is made of letters, digits and underscores, got {name!r:.80}", hint=_HINT
            )
        others = [] if words is None else [words] if isinstance(words, str) else words
        if not isinstance(others, list | tuple) or not all(isinstance(word, str) for word in others):
            raise InputError(f"other words for {name!r} are a list of texts, got {words!r:.80}", hint=_HINT)
        _check_side(name)
        for phrase in (name, *others):
            _check_phrase(phrase, name)
            owner = of_phrase.setdefault(_key(phrase), name)
            if owner != name:
                raise InputError(f"{phrase!r:.80} names both {owner!r} and {name!r} in structures", hint=_HINT)
        found[name] = tuple(normalise(word) for word in others)
    for name in found:
        other = of_phrase.get(_key(mirrored_words(name)))
        if other not in (None, mirrored_words(name)):  # in a mirrored patch, neither would be the other
            raise InputError(
                f"{name!r} and {other!r} in structures are two sides that are not written alike",
                hint="structures: {plaque_left: [], plaque_right: []}",
            )
    return found


def _check_side(name: str) -> None:
    """Checks that a side in a name is the word left or right, by which a mirrored patch shows the other structure.

    Raises:
        InputError: It is abbreviated, or in another language.
    """
    sides = load_table().sides_of(normalise(name))
    if len(sides) == 1 and not sides <= set(name.lower().split("_")):
        (side,) = sides
        raise InputError(
            f"the name {name!r} in structures seems to name the {side} side, which is written as the word {side}",
            hint="structures: {plaque_left: [], plaque_right: []}",
        )


def _check_phrase(phrase: str, name: str) -> None:
    """Checks that a phrase can be read, and that it is not the name of a structure of the class table.

    Raises:
        InputError: It is, or may be a typo of one.
    """
    words = normalise(phrase)
    if asks_all(phrase) or words in _RESERVED:
        raise InputError(f"{phrase!r:.80} in structures names no structure", hint=_HINT)
    refusal = unreadable(phrase)
    if refusal or not any(map(str.isalpha, words)):
        reason = refusal.reason if refusal else "has no letter"
        raise InputError(f"{phrase!r:.80}, a name of {name!r} in structures, {reason}", hint=_HINT)
    sides, own_sides = load_table().sides_of(words), load_table().sides_of(normalise(name))
    if sides and sides != own_sides:
        raise InputError(f"{phrase!r:.80}, another name of {name!r} in structures, names another side", hint=_HINT)
    found = load_table().resolve(words)
    meant = ", ".join(found.names[:4])
    if found.how == "close":
        raise InputError(
            f"{phrase!r:.80} in structures is close to {meant} of the class table",
            hint=f"name it {meant}, which needs no declaration, or write a name that differs more",
        )
    if found.names:
        raise InputError(
            f"{phrase!r:.80} in structures is a name of {meant} in the class table",
            hint=f"name it {meant}, which needs no declaration",
        )


def find_own(text: str, own: Collection[str]) -> str | None:
    """Returns the structure of one's own that a text names, whatever its capitals and the order of its words.

    Args:
        text: What a user or a file writes; a side may be abbreviated.
        own: Names, or a mapping of names to other words for them.
    """
    if not own or text.strip() in own:
        return text.strip() if own else None
    if len(text) > LONGEST_PROMPT:  # words are compared one by one
        return None
    asked = _key(text)
    others = own if isinstance(own, Mapping) else {}
    return next((name for name in own if asked in map(_key, (name, *(others.get(name) or ())))), None)


@lru_cache(maxsize=4096)
def _key(text: str) -> tuple[str, ...]:
    """Returns the words of a name in one order, with the side written out."""
    return tuple(sorted(_spelled_out(text)))


def _spelled_out(text: str) -> list[str]:
    """Returns the words of a text in lower case, with an abbreviated side as the word left or right at the end."""
    words = re.findall(r"[^\W_]+", text.lower())
    sides = load_table().sides_of(" ".join(words)) if words else frozenset[str]()
    if len(sides) != 1 or sides <= set(words):
        return words
    for place in range(len(words)):
        rest = words[:place] + words[place + 1 :]
        if rest and not load_table().sides_of(" ".join(rest)):
            return [*rest, *sides]
    return words


def own_label(text: str, labels: Iterable[str]) -> str | None:
    """Returns the label that a text names and that the class table does not have.

    A label is found by its very name before the class table is read, and by its words after it.

    Args:
        text: What a user writes.
        labels: Labels, or a mapping of labels to other words for them.
    """
    table, words = load_table(), labels if isinstance(labels, Mapping) else {}
    found = find_own(text, {label: words.get(label, ()) for label in labels if label not in table})
    return found if found == text.strip() or not table.names_of(text) else None


def suggested_name(text: str) -> str:
    """Returns a name in the form of structures for what a file calls one, as in `plaque_left` for "Plaque L"."""
    words = _spelled_out(text[:LONGEST_PROMPT])
    sides = [word for word in words if word in ("left", "right")]
    ordered = [word for word in words if word not in sides] + sides
    return re.sub(r"[^a-z0-9]+", "_", "_".join(ordered)).strip("_")
