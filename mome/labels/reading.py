"""Reads the words of a prompt: which are sides, which are known, and which cannot be read."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

from mome.labels.refusal import Refusal
from mome.labels.sorting import WordSorter
from mome.labels.spelling import corrections, rivals
from mome.labels.structures import Structure, StructureIndex, singulars
from mome.labels.tokens import Token, split_capitals, split_words

# Unknown words of up to this many letters may be abbreviations (our choice).
_LONGEST_ABBREVIATION = 4
# A prompt with more unknown words is no label with typos. The limit bounds the combinations that are tried.
_MOST_TYPOS, _MOST_WORDINGS = 4, 400
# No name of a structure in SNOMED CT has more words than this (our choice).
MOST_WORDS = 20


@dataclass(frozen=True)
class Reading:
    """The parts of a prompt.

    Attributes:
        sides: `left`, `right`, both of them, or none.
        kept: The words without sides and fillers, with the words that abbreviations stand for.
        words: The same words in the form that `StructureIndex` compares.
        unknown: Those of `kept` that are neither words of labels nor other terms of anatomy.
        has_misspelt_side: Whether a side was misspelt.
        joins_names: Whether "and" stands between two words of names, as in "liver and tumor".
        refusal: Why the prompt cannot be read, or None.
    """

    sides: frozenset[str]
    kept: list[Token]
    words: list[str]
    unknown: list[Token]
    has_misspelt_side: bool
    joins_names: bool
    refusal: Refusal | None

    @property
    def text(self) -> str:
        """The words without sides and fillers, in lower case."""
        return " ".join(token.text for token in self.kept)

    def corrected(self, index: StructureIndex) -> dict[str, Structure | None]:
        """Returns what the prompt may name once its unknown words are taken for typos.

        Returns:
            Wording → structure. None stands for another term of anatomy. A prompt with one wording is corrected; with
            several of different meanings it is ambiguous.
        """
        if not 0 < len(self.unknown) <= _MOST_TYPOS:
            return {}
        unknown = {token.text for token in self.unknown}
        if not self._wordings(index, {word: _typo_of(word, index) for word in unknown}):
            return {}
        found = self._wordings(index, {word: _rivals_of(word, index) for word in unknown})
        structures: dict[str, Structure | None] = {}
        for wording, structure in found.items():
            if structure not in structures.values():
                structures[wording] = structure
        return structures

    def _wordings(self, index: StructureIndex, choices: dict[str, list[str]]) -> dict[str, Structure | None]:
        """Returns the structures and terms of anatomy that the prompt names with one of the choices for each word."""
        parts = [choices.get(token.text, [token.text]) for token in self.kept]
        found: dict[str, Structure | None] = {}
        for replaced in itertools.islice(itertools.product(*parts), _MOST_WORDINGS):
            words = [index.canonical(word) for word in replaced]
            structure = index.find(words)
            if structure is not None or index.is_term(words):
                found[" ".join(replaced)] = structure
        return found

    def respelt(self, index: StructureIndex) -> list[str]:
        """Returns the words with the unknown ones replaced by the nearest word of a label or of other anatomy."""
        if not 0 < len(self.unknown) <= _MOST_TYPOS:
            return self.words
        known = index.label_words | index.vocabulary.term_words
        nearest = {t.text: next(iter(corrections(t.text, known)), t.text) for t in self.unknown}
        return [index.canonical(nearest.get(token.text, token.text)) for token in self.kept]

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

    def left_over(self, index: StructureIndex, *, is_sided: bool) -> str | None:
        """Returns a word that free text must not hold, as it was typed, or None.

        Numbers and single letters choose one of several structures ("rib 5.5", "kidney D"). Beside a structure with
        two sides, any unknown word may be a side in a language that the word lists lack.
        """
        if index.is_term(self.words):
            return None
        for token, compared in zip(self.kept, self.words, strict=True):
            word = token.text
            is_number = any(map(str.isdigit, compared)) and not re.fullmatch(r"[ctls]\d+", word)
            is_unknown = token in self.unknown and word not in index.vocabulary.not_sides
            # "LULobe" and "CostaL" hold a known word beside letters that may be a side.
            parts = [part.text for part in split_capitals(token)] if is_unknown else []
            holds_known = any(len(part) > 2 and index.is_known(part) for part in parts)
            ends_in_side = re.fullmatch(r".*[a-z][LR]", token.typed) and index.is_known(word[:-1])
            may_hold_side = holds_known or ends_in_side or (is_unknown and (is_sided or index.holds_name(word)))
            if is_number or len(word) == 1 or may_hold_side:
                return token.typed
        return None


def read(prompt: str, index: StructureIndex) -> Reading:
    """Reads the words of a prompt; see `Reading`."""
    sorter = WordSorter(index)
    tokens = split_words(prompt, index.vocabulary)
    sorter.add_all(tokens)
    sorter.check_sides_before_names()
    # The lung of "LUL" is the same one in "Lung_LUL".
    typed = {token.text for token in sorter.kept if not token.abbreviation}
    kept = [token for token in sorter.kept if not token.abbreviation or token.text not in typed]
    words = [index.canonical(token.text) for token in kept]
    refusal = sorter.refusal
    if len(words) > MOST_WORDS:
        refusal = refusal or Refusal(f"has more than {MOST_WORDS} words", "name one structure, as in -p 'left kidney'")
    if tokens and not words:
        refusal = refusal or Refusal("names no structure", "name one, as in -p 'left kidney'")
    is_name = index.find(words) is not None or index.is_term(words)
    if sorter.derived and not is_name:
        reason = f"asks by {sorter.derived[0].typed!r} for a volume that differs from the structure itself"
        refusal = refusal or Refusal(reason, "ask for the structure alone, and make the other volume from its mask")
    return Reading(
        sides=frozenset(sorter.sides),
        kept=kept,
        words=words,
        unknown=[token for token in kept if not index.is_known(token.text)],
        has_misspelt_side=sorter.has_misspelt_side,
        joins_names=any(0 < place < len(sorter.kept) for place in sorter.joined_at),
        refusal=refusal or _contradiction(sorter, words),
    )


def _contradiction(sorter: WordSorter, words: list[str]) -> Refusal | None:
    """Returns why the sides of a prompt contradict each other, or None.

    Both sides are asked for by "left and right kidney", "L/R kidney" or "left kidney, right kidney", but not by "left
    RUL" or "right kidney left".
    """
    stated = [side for side in sorter.side_words if side.side != "both"]
    names = {side.side for side in stated}
    hint = "name one side, or ask for left and right"
    if len(names) == 1 and len(stated) < len(sorter.side_words):
        return Refusal(f"names the {stated[0].side} side and both sides", hint)
    is_repeated = any(count > 1 for word, count in Counter(words).items() if not word.isdigit())
    if len(names) < 2 or is_repeated:
        return None
    short = next((side for side in stated if side.abbreviation), None)
    if short is not None:
        return Refusal(f"names another side than {short.abbreviation!r}, which is {short.side}", hint)
    places = [side.place for side in stated]
    if sorter.has_and or max(places) - min(places) < len(places):
        return None
    return Refusal("names the left and the right side in different places", hint)


def _typo_of(word: str, index: StructureIndex) -> list[str]:
    """Returns the words of labels that `word` may be a typo of, in singular or plural."""
    for form in (word, *singulars(word)):
        found = corrections(form, index.label_words)
        if found:
            return found
    return []


def _rivals_of(word: str, index: StructureIndex) -> list[str]:
    """Returns the words of labels and of other anatomy that `word` may be a typo of."""
    return [
        rival
        for form in dict.fromkeys((word, *singulars(word)))
        for rival in rivals(form, index.label_words, index.vocabulary.term_words)
    ]
