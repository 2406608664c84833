"""Values of DICOM elements, read so that a missing or malformed value is None instead of an error."""

from __future__ import annotations

from typing import Any

import numpy as np

UNDEFINED_LENGTH = 0xFFFFFFFF
"""The length of an element whose value ends with a delimiter."""


def numbers(dataset: Any, keyword: str, count: int) -> np.ndarray | None:
    """Returns `count` finite numbers as float64, or None where the element is missing, empty or malformed."""
    try:
        value = dataset.get(keyword)
        values = np.atleast_1d(np.asarray([] if value is None else value, dtype=np.float64))
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def number(dataset: Any, keyword: str) -> float | None:
    """Returns one finite number, or None."""
    values = numbers(dataset, keyword, 1)
    return None if values is None else float(values[0])


def integer(dataset: Any, keyword: str) -> int | None:
    """Returns one number without its fraction, or None."""
    value = number(dataset, keyword)
    return None if value is None else int(value)


def is_short(element: Any) -> bool:
    """Says whether the value of an element, as pydicom read it, has fewer bytes than its length."""
    value, length = getattr(element, "value", None), getattr(element, "length", UNDEFINED_LENGTH)
    return isinstance(value, bytes) and length != UNDEFINED_LENGTH and len(value) < length


def texts(value: Any) -> tuple[str, ...]:
    """Returns the values of an element of texts, in upper case and without spaces around them."""
    values = [value] if isinstance(value, str) else list(value or [])
    return tuple(printable(text).upper() for text in values)


def printable(text: Any, longest: int = 64) -> str:
    """Returns a text without control characters, which a terminal would obey, cut to `longest` characters."""
    return "".join(character if character.isprintable() else "?" for character in str(text or "")).strip()[:longest]
