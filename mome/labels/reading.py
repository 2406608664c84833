"""Reads the words of a prompt: which are sides, which are known, and which cannot be read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from mome.labels.spelling import corrections, is_misspelt_side
from mome.labels.structures import SIDES, Structure, StructureIndex, singulars
from mome.labels.tokens import Token, split_words

# Unknown words of up to this many letters may be abbreviations (our choice).
_LONGEST_ABBREVIATION = 4
# A prompt with more unknown words is no label with typos. The limit bounds the combinations that are tried.
_MOST_TYPOS = 4


class Refusal(NamedTuple):
    """Why a prompt cannot be read.

    Attributes:
        reason: The end of a sentence that begins with the prompt.
        hint: What to type instead.
    """

    reason: str
    hint: str


@dataclass(frozen=True)
class Reading:
    """The parts of a prompt.

    Attributes:
        sides: `left`, `right`, both of them, or none.
        kept: The words without sides and fillers, with the words that abbreviations stand for.
        words: The same words in the form that `StructureIndex` compares.
        unknown: Those of `kept` that are neither words of labels nor other terms of anatomy.
        has_misspelt_side: Whether a side was misspelt.
        refusal: Why the prompt cannot be read, or None.
    """

    sides: frozenset[str]
    kept: list[Token]
    words: list[str]
    unknown: list[Token]
    has_misspelt_side: bool
    refusal: Refusal | None

    @property
    def text(self) -> str:
        """The words without sides and fillers, in lower case."""
        return " ".join(token.text for token in self.kept)

    def corrected_structures(self, index: StructureIndex) -> list[Structure]:
        """Returns the structures that the prompt names once its unknown words are taken for typos."""
        if not 0 < len(self.unknown) <= _MOST_TYPOS:
            return []
        choices = [_typo_of(token.text, index) for token in self.unknown]
        known = [word for token, word in zip(self.kept, self.words, strict=True) if token not in self.unknown]
        found: list[Structure] = []
        for replaced in itertools.product(*choices):
            structure = index.find([*known, *map(index.canonical, replaced)])
            if structure is not None and structure not in found:
                found.append(structure)
        return found

    def unread_abbreviation(self) -> str | None:
        """Returns an unknown word that looks like an abbreviation, as it was typed, or None.

        A short word counts as one where it is typed in upper case beside words that are not, or where the prompt has
        no other words.
        """
        short = [t for t in self.unknown if len(t.text) <= _LONGEST_ABBREVIATION and t.text.isalpha()]
        if short and len(short) == len(self.kept):
            upper = [t for t in short if t.typed.isupper() or len(t.text) < _LONGEST_ABBREVIATION]
        elif any(not token.typed.isupper() for token in self.kept):
            upper = [t for t in short if t.typed.isupper() and len(t.text) > 1]
        else:
            upper = []
        return upper[0].typed if upper else None


def read(prompt: str, index: StructureIndex) -> Reading:
    """Reads the words of a prompt; see `Reading`."""
    tokens = split_words(prompt, index.vocabulary)
    reader = _Reader(index)
    for token in _expand(tokens, index.vocabulary.expanded):
        reader.add(token)
    if tokens and not reader.kept and reader.refusal is None:
        reader.refusal = Refusal("names no structure", "name one, as in -p 'left kidney'")
    return Reading(
        sides=frozenset(reader.sides),
        kept=reader.kept,
        words=[index.canonical(token.text) for token in reader.kept],
        unknown=[token for token in reader.kept if not index.is_known(token.text)],
        has_misspelt_side=reader.has_misspelt_side,
        refusal=reader.refusal,
    )


def _typo_of(word: str, index: StructureIndex) -> list[str]:
    """Returns the words of labels that `word` may be a typo of, in singular or plural."""
    for form in (word, *singulars(word)):
        found = corrections(form, index.label_words)
        if found:
            return found
    return []


def _expand(tokens: list[Token], expanded: dict[str, str]) -> list[Token]:
    """Replaces abbreviations by the words that they stand for; those of several words are replaced first."""
    by_words = {tuple(short.split()): words for short, words in expanded.items()}
    longest = max(map(len, by_words))
    result: list[Token] = []
    place = 0
    while place < len(tokens):
        for length in range(longest, 0, -1):
            words = by_words.get(tuple(token.text for token in tokens[place : place + length]))
            if words is not None:
                result += [Token(word, word) for word in words.split()]
                place += length
                break
        else:
            result.append(tokens[place])
            place += 1
    return result


class _Reader:
    """Sorts the words of a prompt, one after the other; the attributes are those of `Reading`."""

    def __init__(self, index: StructureIndex) -> None:
        self.index = index
        self.sides: set[str] = set()
        self.kept: list[Token] = []
        self.has_misspelt_side = False
        self.refusal: Refusal | None = None

    def add(self, token: Token) -> None:
        """Adds one word: as a side, as words of a name, or as the reason for a refusal."""
        vocabulary = self.index.vocabulary
        if self._add_side(token):
            return
        if token.text in vocabulary.refused:
            meanings = vocabulary.refused[token.text].replace("; ", " or ")
            self._refuse(f"has the abbreviation {token.typed!r} ({meanings})", "write the words out")
        elif self.index.canonical(token.text) in vocabulary.fillers:
            return
        elif self.index.is_known(token.text):
            self.kept.append(token)
        elif compound := self.index.compound(token.text):
            self._keep(compound)
        elif not self._add_glued_side(token):
            self.kept.append(token)

    def _keep(self, words: list[str]) -> None:
        self.kept += [Token(word, word) for word in words]

    def _refuse(self, reason: str, hint: str) -> None:
        self.refusal = self.refusal or Refusal(reason, hint)

    def _add_side(self, token: Token) -> bool:
        """Adds the side that a word names, also where it is misspelt; returns whether it names one."""
        side = self._side(token.text)
        if side is None and not self.index.is_known(token.text):
            side = self._misspelt_side(token.text)
            self.has_misspelt_side |= side is not None
        if side == "relative":
            reason = f"names a side by {token.typed!r}, which depends on what it is compared with"
            self._refuse(reason, "say left or right")
        elif side == "both":
            self.sides.update(SIDES)
        elif side is not None:
            self.sides.add(side)
        return side is not None

    def _side(self, word: str) -> str | None:
        """Returns the side that a word names, in singular or plural."""
        sides = self.index.vocabulary.sides
        return sides.get(word) or (sides.get(word.removesuffix("s")) if len(word) > 4 else None)

    def _misspelt_side(self, word: str) -> str | None:
        vocabulary = self.index.vocabulary
        if word in vocabulary.not_sides:
            return None
        known = ("left", "right", "bilateral")
        return next((vocabulary.sides[side] for side in known if is_misspelt_side(word, side)), None)

    def _add_glued_side(self, token: Token) -> bool:
        """Adds a side that is written together with a sided structure ("ParotidL", "leftkidney").

        A single letter in the same case as the name beside it may be a typo ("llung"), and the prompt is refused.

        Returns:
            Whether the word consists of a side and a sided structure.
        """
        text, typed = token.text, token.typed
        for glued in self.index.vocabulary.glued_sides:
            side = self.index.vocabulary.sides[glued]
            if text.startswith(glued):
                words = self._sided_structure(text[len(glued) :])
                case_differs = (
                    typed[0].isupper() and typed[1:3].istitle() or typed[0].islower() and typed[1:2].isupper()
                )
            elif text.endswith(glued):
                words = self._sided_structure(text[: -len(glued)])
                case_differs = typed[-1:].isupper() != typed[-2:-1].isupper()
            else:
                continue
            if words is None:
                continue
            if len(glued) == 1 and not case_differs:
                name = " ".join(words)
                self._refuse(f"may name the {side} side or be a typo", f"ask for '{side} {name}', or for {name!r}")
            self.sides.add(side)
            self._keep(words)
            return True
        return False

    def _sided_structure(self, word: str) -> list[str] | None:
        """Returns the words of the sided structure that is written as one word, or None."""
        words = self.index.compound(word) or [word]
        structure = self.index.find(self.index.canonical(part) for part in words)
        return words if structure is not None and structure.has_sides else None
