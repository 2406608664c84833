"""The characters of a prompt: which ones are read, and why a prompt with others is refused."""

from __future__ import annotations

import re
import unicodedata

from mome.labels.refusal import Refusal

# The longest name of a structure in SNOMED CT has fewer letters than this (our choice).
LONGEST_PROMPT = 200
_PUNCTUATION = frozenset(" _-.,;:/\\|()[]{}'\"`&+#\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014")
_NEGATIVE_NUMBER = re.compile(r"(^|[\s(\[])[-\u2010-\u2014]\d")
# Compatibility forms that change the meaning when they become plain characters: "1²" would be read as "12".
_MEANINGFUL_FORMS = ("<super>", "<sub>", "<fraction>", "<circle>", "<square>")


def unreadable(prompt: str) -> Refusal | None:
    """Returns why a prompt cannot be read: its length or one of its characters; None where it can be read.

    Letters must be Latin, because a letter of another alphabet may look like a Latin one or spell a side that the
    word lists lack. Symbols are refused because many of them change the meaning ("~" is a partial structure in AAPM
    TG-263), and invisible characters because nobody sees what they hide.
    """
    if len(prompt) > LONGEST_PROMPT:
        too_long = f"has {len(prompt)} characters; a prompt has at most {LONGEST_PROMPT}"
        return Refusal(too_long, "name one structure, as in -p 'left kidney'")
    if prompt.isascii() and prompt.isprintable() and not any(map(str.isalnum, prompt)):
        return None  # Signs alone name nothing; whoever writes the mask says that they give no file name.
    if _NEGATIVE_NUMBER.search(prompt):
        return Refusal("has a negative number", "type the number without a sign")
    # Marks that are left after composition belong to no accented letter; a struck-out word is made of such marks.
    reasons = map(_reason, unicodedata.normalize("NFC", prompt))
    reason = next(filter(None, reasons), None)
    return Refusal(reason, "type the name in English or Latin, with plain letters") if reason else None


def _reason(character: str) -> str | None:
    if character.isascii() and character.isalnum() or character.isspace() or character in _PUNCTUATION:
        return None
    shown = f"U+{ord(character):04X}"
    category = unicodedata.category(character)
    if category[0] == "C":
        return f"has a character that is not visible ({shown})"
    if unicodedata.decomposition(character).startswith(_MEANINGFUL_FORMS):
        return f"has the raised, lowered or enclosed character {character!r} ({shown})"
    plain = unicodedata.normalize("NFKC", character)
    if all(letter.isascii() and (letter.isalnum() or letter in _PUNCTUATION) for letter in plain):
        return None
    if category[0] == "L":
        is_latin = all(unicodedata.name(letter, "").startswith("LATIN ") for letter in plain)
        return None if is_latin else f"has the letter {character!r} ({shown}), which is not Latin"
    return f"has the character {character!r} ({shown}), which no name of a structure has"
