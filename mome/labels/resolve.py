"""Reads what a user types as labels: sides first, then the structure, and a corrected typo last."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from mome.errors import InputError, did_you_mean
from mome.labels.characters import unreadable
from mome.labels.label import Label
from mome.labels.reading import Reading, read
from mome.labels.structures import Structure, StructureIndex
from mome.labels.tokens import normalise

_ANY_DASH = r"[-\u2010-\u2015\u2212]"
_SPACED_DASH = re.compile(rf"\s+{_ANY_DASH}\s*|{_ANY_DASH}\s+")
_DASH = (
    "has a dash between two names, which may mean 'without'",
    "name only what is asked for; write a space in place of the dash where it is one name",
)


@dataclass(frozen=True)
class Resolved:
    """A prompt after the class table was searched for it.

    Attributes:
        prompt: The text that the user typed.
        name: The label's name; None where there is not exactly one label.
        label: The label; None where there is not exactly one.
        how: `exact`, `synonym`, `pair` (both sides, because no side was named), `group` (several labels under one
            name), `close` (a typo was corrected), `free` (free text) or `refused`.
        warning: A sentence for the user, or None. Where the prompt is refused, it gives the reason.
        names: The names of all labels: one, several for a pair or a group, none for free text.
        free_text: The wording of free text for the text tower, where it is not the prompt itself.
        hint: What to ask for instead of a refused prompt.
    """

    prompt: str
    name: str | None
    label: Label | None
    how: str
    warning: str | None
    names: tuple[str, ...] = ()
    free_text: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Finding:
    """What `resolve` found; see `Resolved` for the attributes."""

    how: str
    names: tuple[str, ...] = ()
    warning: str | None = None
    free_text: str | None = None
    hint: str | None = None


def resolve(prompt: str, phrases: dict[str, str], index: StructureIndex) -> Finding:
    """Finds the labels that a prompt names.

    A side is read before anything else and never becomes part of free text, because a text tower does not reliably
    tell left from right. Only typos are corrected, word by word. A word that is known, as part of a label's name or as
    another term of anatomy, is never changed, so that sides, vertebral levels, numbers and organs cannot be swapped.

    Args:
        prompt: The text that the user typed.
        phrases: Normalised phrase → label name.
        index: The structures of the same labels.

    Raises:
        InputError: The prompt is empty.
    """
    text = normalise(prompt)
    refusal = unreadable(prompt)
    if refusal:
        return _refused(prompt, *refusal)
    if _may_mean_without(prompt, index):
        return _refused(prompt, *_DASH)
    if text in phrases:
        exact = normalise(phrases[text]) == text
        return Finding("exact" if exact else "synonym", (phrases[text],))
    if not text:
        raise InputError("a prompt is empty", hint="name a structure, as in -p liver")
    reading = read(prompt, index)
    if reading.refusal:
        return _refused(prompt, *reading.refusal)
    structure = index.find(reading.words)
    is_list = reading.joins_names and not index.has_and(reading.words)
    if structure is not None and is_list:
        # "liver and tumor" asks for two structures and not for the tumor of the liver.
        return _refused(prompt, "joins two names by 'and'", f"one prompt for each, or {structure.names[0]!r}")
    structure = structure or _repeated(reading, index)
    if structure is not None:
        return _labels(prompt, reading, structure)
    spelled = reading.corrected(index)
    if len(spelled) > 1:
        choices = " or ".join(map(repr, list(spelled)[:3]))
        return _refused(prompt, f"may be a typo of {choices}", "check the spelling")
    for corrected in spelled.values():
        if corrected is not None:
            return _labels(prompt, reading, corrected, is_corrected=True)
    return _free_text(prompt, reading, phrases, index)


def _refused(prompt: str, reason: str, hint: str) -> Finding:
    return Finding("refused", warning=f"{prompt!r:.80} {reason}", hint=hint)


def _repeated(reading: Reading, index: StructureIndex) -> Structure | None:
    """The structure that a prompt names more than once ("left parotid and right parotid gland"), or None."""
    if index.is_term(reading.words):
        return None
    found = index.split(reading.words)
    return found[0] if found and all(other == found[0] for other in found) else None


def _labels(prompt: str, reading: Reading, structure: Structure, *, is_corrected: bool = False) -> Finding:
    """The labels of a structure on the sides that the prompt names."""
    names = structure.take(reading.sides)
    if not names:
        side = " and ".join(sorted(reading.sides))
        if structure.has_sides:
            what = f"names the {side} side; the class table has {' and '.join(structure.names[:2])} only"
        else:
            what = f"names a side ({side}), but {structure.names[0]!r} has no left and right in the class table"
        return Finding("refused", warning=f"{prompt!r:.80} {what}", hint=f"ask for {structure.names[0]}")
    shown = names if len(names) <= 3 else (names[0], "…", names[-1])
    if is_corrected or reading.has_misspelt_side:
        nearest = " and ".join(repr(name) for name in shown)
        noun = "label" if len(names) == 1 else "labels"
        return Finding("close", names, f"{prompt!r:.80} is read as {nearest}, the closest {noun}")
    if structure.is_group:
        return Finding("group", names, f"{prompt!r:.80} names {len(names)} labels: {', '.join(shown)}")
    if len(names) == 2:
        asked = " and ".join(names)
        return Finding("pair", names, f"{prompt!r:.80} has two sides and is read as both, as if you ask for {asked}")
    if structure.has_sides and not reading.sides and names != structure.unsided:
        return Finding("pair", names, f"{prompt!r:.80} is read as {names[0]!r}, the only side in the class table")
    return Finding("synonym", names)


def _listed_names(prompt: str, index: StructureIndex) -> list[str]:
    """Returns the parts of a prompt that lists several structures ("liver and spleen"), or nothing.

    Parts that are other terms of anatomy count beside a label where no comma divides them ("larynx/pharynx"): a comma
    also inverts the words of one name ("cartilage, thyroid").
    """
    parts = [part.strip() for part in re.split(r"\band\b|[,;+&]", prompt, flags=re.IGNORECASE)]
    named = [part for part in parts if part and index.find(read(part, index).words) is not None]
    if len(named) == len(parts) > 1:
        return named
    parts = [part.strip() for part in re.split(r"\band\b|[/;+&]", prompt, flags=re.IGNORECASE)]
    words_of_parts = [read(part, index).words for part in parts]
    if len(parts) > 1 and any(index.find(words) is not None for words in words_of_parts):
        if all(words and (index.find(words) is not None or index.is_term(words)) for words in words_of_parts):
            return parts
    words = read(prompt, index).words
    return [] if index.is_term(words) else [structure.names[0] for structure in index.split(words)]


def _may_mean_without(prompt: str, index: StructureIndex) -> bool:
    """Says whether one dash beside a space stands between two names that are a third one together, as "liver - tumor".

    Where there are several such dashes, they stand for spaces.
    """
    parts = _SPACED_DASH.split(prompt)
    if len(parts) != 2 or not all(part.strip() for part in parts):
        return False
    first, second, whole = (read(text, index).words for text in (*parts, prompt))
    structure = index.find(first)
    is_name = index.find(second) is not None or index.is_term(second)
    return structure is not None and is_name and index.find(whole) != structure


def _takes_away(prompt: str, index: StructureIndex) -> bool:
    """Says whether a dash stands between two names, as in "mandible-teeth", where it may mean "without"."""
    parts = re.split(rf"\s*{_ANY_DASH}\s*", prompt)
    words = [read(part, index).words if part.strip() else [] for part in parts]
    is_name = [bool(found) and (index.find(found) is not None or index.is_term(found)) for found in words]
    return any(first and second for first, second in itertools.pairwise(is_name))


def _free_text(prompt: str, reading: Reading, phrases: dict[str, str], index: StructureIndex) -> Finding:
    """A prompt that names no label: free text, or refused where its side or one of its words would be guessed at."""
    has_two_sides = index.has_two_sides(reading.words)
    level = next((token.typed for token in reading.kept if re.fullmatch(r"l\d+", token.text)), None)
    if level and has_two_sides and not reading.sides:
        reason = f"is not clear: {level!r} may be a side and a number, or a vertebra"
        return _refused(prompt, reason, "write left, or name the vertebra alone")
    listed = _listed_names(prompt, index)
    if listed:
        hint = "one prompt for each: " + " ".join(f"-p {part!r}" for part in listed[:3])
        return _refused(prompt, "names several structures", hint)
    if not index.is_term(reading.words) and _takes_away(prompt, index):
        return _refused(prompt, *_DASH)
    rest = reading.text
    is_sided = has_two_sides or bool(reading.sides) or index.has_two_sides(reading.respelt(index))
    left_over = reading.left_over(index, is_sided=is_sided)
    not_read = f"has {left_over!r}, which is not understood beside the other words"
    advice = "name the structure alone, with left or right where it has sides; see mome list labels"
    if len(reading.sides) == 1:
        side = next(iter(reading.sides))
        if left_over:
            return _refused(prompt, f"names the {side} side, and {not_read}", advice)
        reason = f"names the {side} side of a structure that the class table does not have; free text cannot tell left "
        return _refused(prompt, reason + "from right", f"ask for {rest!r:.80} without a side, or see mome list labels")
    unread = reading.unread_abbreviation()
    if unread:
        hint = "write the words out; mome list labels shows the class table"
        return _refused(prompt, f"has {unread!r}, which is no known abbreviation", hint)
    if left_over and not any(letter.isalpha() for letter in prompt):
        return _refused(prompt, "is no name of a structure", "name it in words; see mome list labels")
    if left_over:
        return _refused(prompt, not_read, advice)
    if is_sided:
        wording = f"left and right {rest}"
        warning = f"{prompt!r:.80} is not in the class table and is read as free text for both sides, {wording!r:.80}"
        return Finding("free", warning=warning, free_text=wording)
    text = normalise(prompt)
    # Comparing with every phrase takes ten times as long as reading the prompt.
    similar = [phrase for phrase in phrases if phrase[0] == text[0] and abs(len(phrase) - len(text)) <= 4]
    nearest = did_you_mean(text, similar) if reading.unknown else ""
    return Finding("free", warning=f"{prompt!r:.80} is not in the class table and is read as free text{nearest}")
