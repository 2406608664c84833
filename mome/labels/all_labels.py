"""The prompt that stands for every structure that a model was trained on."""

from __future__ import annotations

import re

from mome.errors import InputError
from mome.labels.tokens import normalise

_WORDS = ("all", "everything", "all structures")


def asks_all(prompt: str) -> bool:
    """Says whether a prompt asks for every structure that the model was trained on.

    Raises:
        InputError: It asks for these and for others in one prompt, as in "all, mandible", or takes some away.
    """
    if normalise(prompt) in _WORDS:
        return True
    parts = [part.strip() for part in re.split(r"\band\b|[^\w ]", prompt[:1000], flags=re.IGNORECASE)]
    found = next((part for part in parts if normalise(part) in _WORDS), None)
    if found is not None and len(parts) > 1:
        raise InputError(
            f"{prompt!r:.80} names more than {found!r}", hint=f"{found!r} alone, or one prompt for each structure"
        )
    return False
