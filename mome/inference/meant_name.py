"""Finds which of several prompts a name or a synonym means."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

from mome.errors import InputError
from mome.labels import load_table
from mome.labels.own import own_label


def meant_name(key: str, names: Collection[str], what: str) -> str:
    """Returns the prompt that is meant by its name, by a synonym of the class table, or by the words of its name.

    Args:
        key: What a user wrote.
        names: The names of the prompts there are.
        what: What there is of each prompt, for the message.

    Raises:
        KeyError: It means none of them; the message names them.
    """
    meant = [key]
    with contextlib.suppress(InputError, AttributeError):  # an empty key, or one that is no text
        resolved = load_table().resolve(key)
        meant.append(key.strip())
        if resolved.name is not None and resolved.how in ("exact", "synonym"):
            meant.append(resolved.name)
        meant += [found] if (found := own_label(key, names)) else []
    for name in meant:
        if name in names:
            return name
    raise KeyError(f"there is no {what} of {key!r}, only of {', '.join(names)}")
