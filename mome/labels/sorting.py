"""Sorts the words of a prompt: sides, words of names, and words that make it unreadable."""

from __future__ import annotations

from typing import NamedTuple

from mome.labels.refusal import Refusal
from mome.labels.spelling import corrections, is_misspelt_side
from mome.labels.structures import SIDES, StructureIndex
from mome.labels.tokens import Token, split_capitals

_CONNECTORS = ("and", "und", "et")
# The shortest name that a single letter for a side is looked for at ("leye").
_SHORTEST_NAME = 3
_TWO_SIDES = ("rleft", "leftr", "lright", "rightl")


class SideWord(NamedTuple):
    """A word for a side.

    Attributes:
        side: `left`, `right` or `both`.
        place: The number of words before it, without fillers.
        abbreviation: The abbreviation that holds the side, such as "RUL", or an empty string.
    """

    side: str
    place: int
    abbreviation: str


class WordSorter:
    """Sorts the words of a prompt, one after the other.

    Attributes:
        side_words: The words for sides.
        kept: The words without sides and fillers, with the words that abbreviations stand for.
        derived: Those of `kept` that ask for a volume which is made from a structure, such as "margin".
        has_and: Whether two parts are joined by "and".
        joined_at: The numbers of kept words before each "and".
        has_misspelt_side: Whether a side was misspelt.
        refusal: Why the prompt cannot be read, or None.
    """

    def __init__(self, index: StructureIndex) -> None:
        self.index = index
        self.side_words: list[SideWord] = []
        self.kept: list[Token] = []
        self.derived: list[Token] = []
        self.has_and = False
        self.joined_at: list[int] = []
        self.has_misspelt_side = False
        self.refusal: Refusal | None = None
        self._place = 0

    @property
    def sides(self) -> set[str]:
        """`left`, `right`, both of them, or none."""
        return {side for word in self.side_words for side in (SIDES if word.side == "both" else (word.side,))}

    def add_all(self, tokens: list[Token]) -> None:
        """Adds words after abbreviations are replaced by the words that they stand for."""
        for token in _expand(tokens, self.index.vocabulary.expanded):
            self._add(token)

    def _add(self, token: Token) -> None:
        """Adds one word: as a side, as words of a name, or as the reason for a refusal."""
        vocabulary, text = self.index.vocabulary, token.text
        if text in _CONNECTORS:
            self.has_and = True
            self.joined_at.append(len(self.kept))
        elif text in vocabulary.negations:
            self._refuse(f"takes something away by {token.typed!r}", "name only what is asked for")
        elif text in vocabulary.alternatives:
            self._refuse(
                f"leaves a choice by {token.typed!r}", "one prompt for each: -p 'left kidney' -p 'right kidney'"
            )
        elif text in vocabulary.eyes_and_ears and self.kept:
            self._refuse_side_of_eyes(token)
        elif self._add_side(token):
            self._place += 1
        elif meanings := vocabulary.refused.get(text.removesuffix("s") if _is_plural_abbreviation(token) else text):
            meanings = meanings.replace("; ", " or ")
            self._refuse(f"has the abbreviation {token.typed!r} ({meanings})", "write the words out")
        elif not self._is_filler(token):
            self._place += 1
            self._add_name(token)

    def check_sides_before_names(self) -> None:
        """Refuses a side of eyes and ears before the name of a structure with two sides, as in "OS parotid".

        Before other words, "os" is a bone ("os coxae", "os pubis").
        """
        for place, token in enumerate(self.kept[:-1]):
            if token.text in self.index.vocabulary.eyes_and_ears:
                words = [self.index.canonical(kept.text) for kept in self.kept]
                if self.index.find(words) is None and self.index.has_two_sides(words[place + 1 :]):
                    self._refuse_side_of_eyes(token)

    def _refuse_side_of_eyes(self, token: Token) -> None:
        self._refuse(f"has the word {token.typed!r}, which may name a side", "say left or right")

    def _is_filler(self, token: Token) -> bool:
        """Whether a word adds nothing; "A" after a name, as in "Kidney A", is no article."""
        is_letter = token.typed == "A" and self._place > 0
        return self.index.canonical(token.text) in self.index.vocabulary.fillers and not is_letter

    def _add_name(self, token: Token) -> None:
        """Adds a word of a name, also where a side or several words are written as one."""
        text = token.text
        if text in self.index.vocabulary.derived:
            self.derived.append(token)
            self.kept.append(token)
        elif self._is_adjective_by_chance(token):
            self.add_all([Token(text[:-1], token.typed[:-1]), Token(text[-1], token.typed[-1])])
        elif self.index.is_known(text):  # A filler is known too, which is right for "A" after a name.
            self.kept.append(token)
        elif compound := self.index.compound(text):
            self._keep(compound)
        elif any(target in text for target in self.index.vocabulary.targets):
            self._refuse(f"has the name of a target or margin, {token.typed!r}", "name the structure alone")
        elif parts := self._readable_parts(token):
            self.add_all(parts)
        elif not self._add_glued_side(token):
            self.kept.append(token)
            side = next((side for side in SIDES if side in text), None)
            if side and text not in self.index.vocabulary.not_sides:
                self._refuse(
                    f"has the word {token.typed!r}, which holds {side!r} and is not known", f"say {side} alone"
                )

    def _keep(self, words: list[str]) -> None:
        self.kept += [Token(word, word) for word in words]

    def _refuse(self, reason: str, hint: str) -> None:
        self.refusal = self.refusal or Refusal(reason, hint)

    def _add_side(self, token: Token) -> bool:
        """Adds the side that a word names, also where it is misspelt; returns whether it names one."""
        side = self._side(token.text)
        if side is None and not self._is_read(token.text):
            side = self._misspelt_side(token.text)
            self.has_misspelt_side |= side is not None
        if side == "relative":
            reason = f"has the word {token.typed!r}, which depends on what it is compared with"
            self._refuse(reason, "say left or right")
        elif side is not None:
            self.side_words.append(SideWord(side, self._place, token.abbreviation))
        return side is not None

    def _side(self, word: str) -> str | None:
        """Returns the side that a word names, in singular or plural."""
        sides = self.index.vocabulary.sides
        return sides.get(word) or (sides.get(word.removesuffix("s")) if len(word) > 4 else None)

    def _misspelt_side(self, word: str) -> str | None:
        vocabulary = self.index.vocabulary
        # "rleft" holds both sides.
        if word in vocabulary.not_sides or word in _TWO_SIDES:
            return None
        known = ("left", "right", "bilateral")
        return next((vocabulary.sides[side] for side in known if is_misspelt_side(word, side)), None)

    def _is_read(self, word: str) -> bool:
        """Whether a word is in one of the lists."""
        vocabulary = self.index.vocabulary
        listed = (
            vocabulary.negations, vocabulary.alternatives, vocabulary.derived, vocabulary.refused, vocabulary.expanded,
            _CONNECTORS,
        )  # fmt: skip
        return any(word in words for words in listed) or self.index.is_known(word)

    def _is_adjective_by_chance(self, token: Token) -> bool:
        """Whether a name and a letter for a side make the adjective of that name ("ScapulaR").

        Adjectives in names of labels ("femoraL head") are left as they are, because their capitals may be random.
        """
        is_set_apart = token.typed[-1:] in ("L", "R") and token.typed[-2:-1].islower()
        return is_set_apart and token.text not in self.index.label_words and self.index.is_known(token.text[:-1])

    def _readable_parts(self, token: Token) -> list[Token]:
        """Returns the words of a name that is split by its capitals ("LKid", "KidneyNot"), or nothing.

        They are returned where all are known, or where the first or the last one is a side.
        """
        parts = split_capitals(token)
        if len(parts) < 2:
            return []
        has_side = any(self._side(part.text) for part in (parts[0], parts[-1]))
        return parts if has_side or all(self._side(part.text) or self._is_read(part.text) for part in parts) else []

    def _add_glued_side(self, token: Token) -> bool:
        """Adds a side that is written together with a name ("leftkidney", "KIDNEYl").

        A single letter in the same case as the name beside it may be a typo ("llung"), and the prompt is refused.

        Returns:
            Whether the word consists of a side and a name.
        """
        text = token.text
        for glued in self.index.vocabulary.glued_sides:
            for is_first in (True, False):
                if not (text.startswith(glued) if is_first else text.endswith(glued)):
                    continue
                words = self._named(text.removeprefix(glued) if is_first else text.removesuffix(glued), text)
                if words is None:
                    continue
                side = self.index.vocabulary.sides[glued]
                if len(glued) == 1 and not (_is_set_apart(token.typed, is_first) and self._has_sides(words)):
                    name = " ".join(words)
                    self._refuse(f"may name the {side} side or be a typo", f"ask for '{side} {name}', or for {name!r}")
                self.side_words.append(SideWord(side, self._place, ""))
                self._keep(words)
                return True
        return False

    def _named(self, word: str, whole: str) -> list[str] | None:
        """Returns the words of the name that is written as one word, also where it is misspelt, or None.

        Args:
            word: The word without the letters of a side.
            whole: The word with these letters. Where this may be a typo of a label's word, `word` is not taken for one.
        """
        if compound := self.index.compound(word):
            return compound
        if len(word) < _SHORTEST_NAME or word in self.index.vocabulary.fillers:
            return None
        known = self.index.label_words
        is_typo = corrections(word, known) and not corrections(whole, known)
        return [word] if self.index.is_known(word) or is_typo else None

    def _has_sides(self, words: list[str]) -> bool:
        structure = self.index.find(self.index.canonical(word) for word in words)
        return structure is not None and structure.has_sides


def _is_set_apart(typed: str, is_first: bool) -> bool:
    """Whether the first or last letter of a word is set apart by its case ("LKidney", "lKIDNEY", "KIDNEYl")."""
    if is_first:
        return typed[0].isupper() and typed[1:3].istitle() or typed[0].islower() and typed[1:2].isupper()
    return typed[-1:].isupper() != typed[-2:-1].isupper()


def _is_plural_abbreviation(token: Token) -> bool:
    """Whether a word is written like the plural of an abbreviation ("RULs")."""
    return token.typed.endswith("s") and token.typed[:-1].isupper() and len(token.typed) > 2


def _expand(tokens: list[Token], expanded: dict[str, str]) -> list[Token]:
    """Replaces abbreviations by the words that they stand for; those of several words are replaced first."""
    by_words = {tuple(short.split()): words for short, words in expanded.items()}
    longest = max(map(len, by_words))
    result: list[Token] = []
    place = 0
    while place < len(tokens):
        for length in range(longest, 0, -1):
            taken = tokens[place : place + length]
            words = by_words.get(tuple(token.text for token in taken))
            if words is None and length == 1 and _is_plural_abbreviation(taken[0]):
                words = by_words.get((taken[0].text.removesuffix("s"),))
            if words is not None:
                typed = " ".join(token.typed for token in taken)
                result += [Token(word, word, typed) for word in words.split()]
                place += length
                break
        else:
            result.append(tokens[place])
            place += 1
    return result
