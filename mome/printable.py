"""Texts from files and names, made safe to print on a terminal."""

from __future__ import annotations

import unicodedata

# Control characters, invisible formatting (such as a change of the writing direction), and halves of surrogate pairs,
# which stand for bytes of a file name that are not UTF-8.
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str, *, keep: str = "") -> str:
    """Returns the text with every character that could steer a terminal written as an escape, as in `\\x1b`.

    Args:
        text: The text.
        keep: Control characters to leave, such as a newline.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSAFE else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
