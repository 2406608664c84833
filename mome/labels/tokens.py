"""Splits a prompt into words: punctuation, numbers, vertebral levels and the prefixes of AAPM TG-263."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from mome.labels.vocabulary import Vocabulary

# "A_Carotid_L" and "V_Portal" are names of AAPM TG-263. Elsewhere, "a" is an article.
_VESSEL_PREFIX = re.compile(r"^\W*([AV])_(?=[A-Z])")
_VESSELS = {"A": "artery_", "V": "vein_"}
_SNOMED_ENDING = re.compile(r"\((body )?structure\)\s*$", re.IGNORECASE)
# Places within a word where lower case turns into upper case ("KidneyL") or a capital begins a word ("LKidney").
_CAPITALS = re.compile(r"[^\W\d_a-z]+(?![a-z])|[^\W\d_a-z]?[a-z]+")
_POSSESSIVE = re.compile(r"['’]s\b", re.IGNORECASE)


class Token(NamedTuple):
    """A word of a prompt.

    Attributes:
        text: The word in lower case, without accents.
        typed: The word as it was typed.
        abbreviation: The abbreviation that the word was written out from, as it was typed; else empty.
    """

    text: str
    typed: str
    abbreviation: str = ""


def normalise(text: str) -> str:
    """Returns `text` in lower case, with single spaces in place of underscores, hyphens, commas and slashes."""
    return " ".join(re.sub(r"[_\-,/]+", " ", text.lower()).split())


def split_words(prompt: str, vocabulary: Vocabulary) -> list[Token]:
    """Splits a prompt into words.

    Numbers are split off ("Rib05L" becomes "rib", "5", "l") and lose their leading zeros. The number of a vertebra
    stays with its letter ("L5", "L 5", "Th12"), except where the prompt is about ribs.
    """
    decomposed = unicodedata.normalize("NFKD", prompt)
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    plain = _POSSESSIVE.sub("", _SNOMED_ENDING.sub("", plain))
    plain = re.sub(r"\bw/o\b", "without", re.sub(r"[&+;]", " and ", plain), flags=re.IGNORECASE)
    plain = _VESSEL_PREFIX.sub(lambda found: _VESSELS[found[1]], plain)
    tokens: list[Token] = []
    for typed in re.findall(r"[^\W_]+", plain):
        tokens += _split_numbers(typed, vocabulary)
    about_ribs = any(token.text in ("rib", "ribs", "costa", "costae") for token in tokens)
    return _split_levels(tokens) if about_ribs else _join_levels(tokens, vocabulary)


def split_capitals(token: Token) -> list[Token]:
    """Splits a word at its capitals: "LKid" → "l", "kid"; a word without such a place is returned alone."""
    parts = _CAPITALS.findall(token.typed)
    if not (token.typed.isascii() and token.typed.isalpha()) or len(parts) < 2 or "".join(parts) != token.typed:
        return [token]
    return [Token(part.lower(), part, token.abbreviation) for part in parts]


def _split_numbers(typed: str, vocabulary: Vocabulary) -> list[Token]:
    """Splits letters from numbers: "Rib05L" → "rib", "5", "l"; "5th" and "L5" stay whole."""
    found = re.fullmatch(r"([^\W\d_]*)0*(\d+)([^\W\d_]*)", typed)
    if found is None:
        return [Token(typed.lower(), typed)]
    letters, number, ending = found.groups()
    if ending.lower() in ("st", "nd", "rd", "th") and not letters:
        return [Token(number, typed)]
    if ending and ending.lower() not in vocabulary.sides:
        return [Token(typed.lower(), typed)]
    if letters.lower() == "th":
        letters = "t"
    if letters.lower() in ("c", "t", "l", "s"):
        parts = [letters + number, ending]
    else:
        parts = [letters, number, ending]
    return [Token(part.lower(), part) for part in parts if part]


def _join_levels(tokens: list[Token], vocabulary: Vocabulary) -> list[Token]:
    """Joins a letter and the number after it to a vertebral level: "L", "5" → "l5"."""
    about_vertebrae = all(t.text in vocabulary.level_words or len(t.text) == 1 or t.text.isdigit() for t in tokens)
    joined: list[Token] = []
    for token in tokens:
        letter = joined[-1].text if joined else ""
        if token.text.isdigit() and (letter in ("c", "t", "th", "s") or (letter == "l" and about_vertebrae)):
            joined[-1] = Token(letter[0] + token.text, joined[-1].typed + token.typed)
        else:
            joined.append(token)
    return joined


def _split_levels(tokens: list[Token]) -> list[Token]:
    """Splits "l5" into the side "l" and the number, in a prompt about ribs."""
    split: list[Token] = []
    for token in tokens:
        found = re.fullmatch(r"l(\d+)", token.text)
        split += [Token("l", "l"), Token(found[1], found[1])] if found else [token]
    return split
