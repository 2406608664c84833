"""The index of names without their sides: the words of a name → the left, the right and the unsided labels."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mome.labels.label import Label
from mome.labels.tokens import split_words
from mome.labels.vocabulary import Vocabulary

SIDES = ("left", "right")


@dataclass(frozen=True)
class Structure:
    """The labels that share a name once the side is left out.

    Attributes:
        unsided: Labels without a side.
        left: Labels of the left side.
        right: Labels of the right side.
        is_group: Whether the name stands for several labels even where its side is given.
    """

    unsided: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    is_group: bool = False

    @property
    def has_sides(self) -> bool:
        """Whether there is a left or a right label."""
        return bool(self.left or self.right)

    @property
    def names(self) -> tuple[str, ...]:
        """All labels."""
        return self.unsided + self.left + self.right

    def take(self, sides: frozenset[str]) -> tuple[str, ...]:
        """Returns the labels of these sides; without sides the unsided labels, else those of both sides.

        The result is empty where the structure lacks one of the sides.
        """
        if not sides:
            return self.unsided or self.left + self.right
        of_side = {"left": self.left, "right": self.right}
        if not all(of_side[side] for side in sides):
            return ()
        return tuple(name for side in SIDES if side in sides for name in of_side[side])


class StructureIndex:
    """Finds structures by their words, in any order.

    Args:
        labels: The labels of a class table.
        vocabulary: The word lists.

    Attributes:
        label_words: The words that occur in names of labels; typos are corrected to these.

    Raises:
        ValueError: Two labels of the same side share a name.
    """

    def __init__(self, labels: Iterable[Label], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.label_words: set[str] = set()
        self._compounds: dict[str, list[str]] = {}
        # Words are counted: "rib 1 1" is not "rib 1".
        self._structures: dict[tuple[str, ...], Structure] = {}
        self._names_with_and: set[tuple[str, ...]] = set()
        labels = list(labels)
        phrases: list[tuple[str, Label]] = []
        for label in labels:
            base = _without_side(label.name)
            names = [label.name, *label.synonyms, *vocabulary.names.get(base, ())]
            for word, patterns in vocabulary.qualifiers.items():
                if any(fnmatch.fnmatchcase(base, pattern) for pattern in patterns):
                    names += [f"{word} {name}" for name in names]
            phrases += [(name, label) for name in names]
        # All words are collected first, because the singular of a word is looked for among them.
        for name in [*(name for name, _ in phrases), *vocabulary.groups]:
            words = self._raw_words(name)
            self.label_words.update(words, (vocabulary.forms.get(word, word) for word in words))
        for name, label in phrases:
            self._add(name, label)
        for name, patterns in vocabulary.groups.items():
            self._add_group(name, patterns, labels)
        self._paired_terms = {_key(self.words(term)) for term in vocabulary.paired_terms}
        self._unpaired_terms = {_key(self.words(term)) for term in vocabulary.unpaired_terms}
        self._names_with: dict[str, list[tuple[str, ...]]] = {}
        for key in sorted(self._structures, key=len, reverse=True):
            for word in set(key):
                self._names_with.setdefault(word, []).append(key)
        self._sided = [frozenset(key) for key, structure in self._structures.items() if structure.has_sides]
        self._sided += map(frozenset, self._paired_terms)

    def find(self, words: Iterable[str]) -> Structure | None:
        """Returns the structure that has exactly these words in its name, or None."""
        return self._structures.get(_key(words))

    def has_and(self, words: Iterable[str]) -> bool:
        """Whether "and" stands in the name with these words ("portal vein and splenic vein")."""
        return _key(words) in self._names_with_and

    def split(self, words: Iterable[str]) -> list[Structure]:
        """Returns the structures whose names are these words one after the other, in any order; empty if none are.

        "kidney kidney cyst" gives the kidney and its cyst. The longest names are taken first.
        """
        rest = Counter(words)
        if not rest:
            return []
        # All words but those of one name are left, so trying the names of any one word is enough.
        word = min(rest, key=lambda word: len(self._names_with.get(word, ())))
        for key in self._names_with.get(word, ()):
            name = Counter(key)
            if name <= rest:
                left = rest - name
                others = self.split(left.elements())
                if others or not left:
                    return [self._structures[key], *others]
        return []

    def is_term(self, words: Iterable[str]) -> bool:
        """Whether these words are a term of anatomy that is no label."""
        key = _key(words)
        return key in self._paired_terms or key in self._unpaired_terms

    def has_two_sides(self, words: Iterable[str]) -> bool:
        """Whether free text is about a structure with a left and a right one: a label, or another term of anatomy."""
        given = list(words)
        return _key(given) not in self._unpaired_terms and any(key <= set(given) for key in self._sided)

    def holds_name(self, word: str) -> bool:
        """Whether a word holds the one-word name of a structure with two sides ("perikidney")."""
        names = (next(iter(key)) for key in self._sided if len(key) == 1)
        return any(len(name) > 3 and name in word for name in names)

    def is_known(self, word: str) -> bool:
        """Whether a word, in singular or plural, stands in a label's name or is another term of anatomy."""
        return any(self._is_listed(form) for form in (word, self.canonical(word)))

    def canonical(self, word: str) -> str:
        """Returns the form of a word that is compared: one spelling, in the singular where that is a known word."""
        word = self.vocabulary.forms.get(word, word)
        for singular in singulars(word):
            listed = self.vocabulary.forms.get(singular, singular)
            if self._is_listed(listed):
                return self.canonical(listed)
        return word

    def compound(self, word: str) -> list[str] | None:
        """Returns the words of a name that is written as one word ("spinalcord"), or None."""
        return self._compounds.get(word) or self._compounds.get(word.removesuffix("s"))

    def words(self, phrase: str) -> list[str]:
        """Returns the words of a name in the compared form, without sides and fillers."""
        return [self.canonical(word) for word in self._raw_words(phrase)]

    def _is_listed(self, word: str) -> bool:
        return word in self.label_words or word in self.vocabulary.term_words or word in self.vocabulary.fillers

    def _raw_words(self, phrase: str) -> list[str]:
        texts = [token.text for token in split_words(phrase, self.vocabulary)]
        return [text for text in texts if text not in SIDES and text not in self.vocabulary.fillers]

    def _add(self, phrase: str, label: Label) -> None:
        words = self.words(phrase)
        as_written = [token.text for token in split_words(phrase, self.vocabulary) if token.text not in SIDES]
        for parts in (words, as_written):
            if len(parts) > 1:
                self._compounds.setdefault("".join(parts), words)
        if "and" in as_written:
            self._names_with_and.add(_key(words))
        key, slot = _key(words), label.laterality or "unsided"
        structure = self._structures.get(key, Structure())
        present = getattr(structure, slot)
        if present and present != (label.name,):
            raise ValueError(f"{phrase!r} names both {present[0]} and {label.name}")
        slots: dict[str, Any] = {slot: (label.name,)}
        self._structures[key] = replace(structure, **slots)

    def _add_group(self, phrase: str, patterns: list[str], labels: list[Label]) -> None:
        members = [
            label
            for label in labels
            if any(fnmatch.fnmatchcase(_without_side(label.name), pattern) for pattern in patterns)
        ]
        if not members:
            return
        key = _key(self.words(phrase))
        if key in self._structures:
            raise ValueError(f"the group {phrase!r} is the name of {self._structures[key].names[0]} too")
        slots = {
            slot: tuple(label.name for label in members if (label.laterality or "unsided") == slot)
            for slot in ("unsided", *SIDES)
        }
        self._structures[key] = Structure(**slots, is_group=True)


def _key(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(words))


def _without_side(name: str) -> str:
    """Returns a label's name without its side: "rib_left_1" → "rib_1"."""
    return "_".join(word for word in name.split("_") if word not in SIDES)


def singulars(word: str) -> list[str]:
    """Returns the forms that may be the singular of a word, English and Latin."""
    if word[:-1].isdigit() and word.endswith("s"):
        return [word[:-1]]
    if len(word) < 3:
        return []
    endings = {"ies": "y", "es": "", "s": "", "ae": "a", "i": "us", "a": "um"}
    return [word[: -len(end)] + singular for end, singular in endings.items() if word.endswith(end)]
