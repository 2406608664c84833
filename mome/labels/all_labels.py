"""The prompt that stands for every structure that a model was trained on."""

from __future__ import annotations

from mome.labels.tokens import normalise

_WORDS = ("all", "everything", "all structures")


def asks_all(prompt: str) -> bool:
    """Says whether a prompt asks for every structure that the model was trained on."""
    return normalise(prompt) in _WORDS
