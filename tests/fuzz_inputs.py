"""Seeded changes to valid texts, JSON values and binary files, for fuzz tests."""

from __future__ import annotations

import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70),
    0.5, 1e308, float("nan"), float("inf"), "", "x", "a/b",
    "../..", "/etc/passwd", "\x1b[31m", "\0", "é", "x" * 5000, [], {}, [[]], [1, "a"], {"name": "mlp"}, {"name": 5},
    {"": None},
    {"name": "swiglu", "n": -1}, "mlp(n=2)", "mlp(n=", "__import__('os')", [None] * 50,
)  # fmt: skip
TOKENS = (
    "(", ")", "[", "]", "{", "}", ":", ",", "=", "'", '"', "\\", "\n", "\t", "#", "&a ", "*a", "<<: ", "!!int ",
    "!!python/", "- ",
    "? ", "null", "true", "1e999", "-", "0x", "nan", "**", "lambda: 1", "\ufeff", "\u202e", "é", "\x07",
    "%", "|", ">",
)  # fmt: skip


def changed_text(rng: random.Random, text: str) -> str:
    """Removes, repeats, replaces or inserts pieces of a text, one to four times."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randint(0, 20))
        choice = rng.randrange(6)
        if choice == 0:
            text = text[:start] + text[end:]
        elif choice == 1:
            text = text[:end] + text[start:end] * rng.randint(1, 5) + text[end:]
        elif choice == 2:
            text = text[:start] + rng.choice(TOKENS) * rng.choice((1, 1, 2, 300)) + text[start:]
        elif choice == 3:
            text = text[:start]
        elif choice == 4:
            text = text[:start] + str(rng.choice(ODD_VALUES)) + text[end:]
        else:
            text = text[:start] + chr(rng.randrange(1, 0xD7FF)) + text[start + 1 :]
    return text


def changed_json(rng: random.Random, value: Any) -> Any:
    """Returns a copy of a JSON value in which one to three places hold something odd."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        if not isinstance(value, dict | list) or not value or rng.random() < 0.03:
            return rng.choice(ODD_VALUES)
        place = value
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            child = place[key]
            if isinstance(child, dict | list) and child and rng.random() < 0.7:
                place = child
                continue
            break
        choice = rng.randrange(4)
        if choice == 0:
            del place[key]
        elif choice == 1 and isinstance(place, dict):
            place[str(rng.choice(ODD_VALUES))[:50]] = place.pop(key)
        else:
            place[key] = rng.choice(ODD_VALUES)
    return value


def encoded(rng: random.Random, text: str) -> bytes:
    """The text as bytes: mostly UTF-8, at times another encoding or damaged."""
    choice = rng.random()
    if choice < 0.04:
        return text.encode("utf-16", "surrogatepass")
    if choice < 0.08:
        return text.encode("latin-1", "replace")
    data = text.encode("utf-8", "surrogatepass")
    if choice < 0.14 and data:
        return changed_bytes(rng, data)
    return b"\xef\xbb\xbf" + data if choice < 0.18 else data


def changed_bytes(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Flips, removes, or inserts bytes, one to four times, among the first `within`; at times cuts the end off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(min(len(changed), within or len(changed)) or 1)
        choice = rng.randrange(4)
        if choice == 0 and changed:
            changed[i] = rng.randrange(256)
        elif choice == 1:
            del changed[i : i + rng.randint(1, 9)]
        elif choice == 2:
            changed[i:i] = rng.randbytes(rng.randint(1, 9))
        elif rng.random() < 0.3:
            del changed[i:]
    return bytes(changed)
