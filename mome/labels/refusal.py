"""The reason why a prompt cannot be read."""

from __future__ import annotations

from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a prompt cannot be read.

    Attributes:
        reason: The end of a sentence that begins with the prompt.
        hint: What to type instead.
    """

    reason: str
    hint: str
