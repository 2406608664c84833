"""The word lists of the prompt reader, read from the YAML files in `words/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "words"


@dataclass(frozen=True)
class Vocabulary:
    """The word lists, all in lower case.

    Attributes:
        sides: Word → `left`, `right`, `both` or `relative`.
        not_sides: Words that are no misspelt side although they are spelled like one.
        eyes_and_ears: Abbreviated sides of eyes and ears, which are words of other meanings before a name.
        glued_sides: Words for a side that may be written without a space, the longest first.
        forms: Another form of a word → the form that the reader compares.
        fillers: Words that are left out.
        level_words: Words beside which a single "l" before a number is a lumbar level.
        names: A label's name without its side → further names.
        qualifiers: A word → patterns of label names to which the word may be added.
        groups: A name → patterns of the names of its labels.
        expanded: Abbreviation → the words that it stands for.
        refused: Abbreviation → its meanings, separated by semicolons.
        paired_terms: Anatomical terms that are no labels and have a left and a right structure.
        unpaired_terms: All other anatomical terms that are no labels.
        other_words: Single words that are never corrected.
        negations: Words that take something away from what is asked for.
        alternatives: Words that leave a choice.
        derived: Words for volumes that are made from a structure and differ from it.
        targets: Names of targets and margins, which may stand within a word.
    """

    sides: dict[str, str]
    not_sides: frozenset[str]
    eyes_and_ears: frozenset[str]
    glued_sides: tuple[str, ...]
    forms: dict[str, str]
    fillers: frozenset[str]
    level_words: frozenset[str]
    names: dict[str, list[str]]
    qualifiers: dict[str, list[str]]
    groups: dict[str, list[str]]
    expanded: dict[str, str]
    refused: dict[str, str]
    paired_terms: tuple[str, ...]
    unpaired_terms: tuple[str, ...]
    other_words: frozenset[str]
    negations: frozenset[str]
    alternatives: frozenset[str]
    derived: frozenset[str]
    targets: tuple[str, ...]

    @cached_property
    def term_words(self) -> frozenset[str]:
        """All words that are no typo of a label's word."""
        terms = [*self.paired_terms, *self.unpaired_terms]
        return frozenset(word for term in terms for word in term.split()) | self.other_words


@lru_cache(maxsize=1)
def load_vocabulary() -> Vocabulary:
    """Reads the word lists of this version of the package; later calls return the same object."""
    sides, forms, names, abbreviations, terms, refused = (
        _read(name) for name in ("sides", "forms", "names", "abbreviations", "vocabulary", "refused")
    )
    return Vocabulary(
        sides={word: side for side in ("left", "right", "both", "relative") for word in sides[side].split()},
        not_sides=frozenset(sides["not_sides"].split()),
        eyes_and_ears=frozenset(sides["eyes_and_ears"].split()),
        glued_sides=tuple(sides["glued"].split()),
        forms={form: word for word, others in forms["forms"].items() for form in others.split()},
        fillers=frozenset(forms["fillers"].split()),
        level_words=frozenset(forms["level_words"].split()),
        names=names["names"],
        qualifiers=names["qualifiers"],
        groups=names["groups"],
        expanded=abbreviations["expanded"],
        refused=abbreviations["refused"],
        paired_terms=_terms(terms["paired"]),
        unpaired_terms=_terms(terms["unpaired"]),
        other_words=frozenset(terms["words"].split()),
        negations=frozenset(refused["negations"].split()),
        alternatives=frozenset(refused["alternatives"].split()),
        derived=frozenset(refused["derived"].split()),
        targets=tuple(refused["targets"].split()),
    )


@lru_cache(maxsize=1)
def prompt_templates() -> tuple[str, ...]:
    """Returns sentences around the name of a structure, in which {} stands for the name."""
    return tuple(_read("templates")["templates"])


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _terms(text: str) -> tuple[str, ...]:
    return tuple(" ".join(term.split()) for term in text.split(",") if term.strip())
