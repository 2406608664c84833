"""Labels by number, without any text."""

from __future__ import annotations

from dataclasses import dataclass

from mome.encoders.text.stored import StoredText


class NoText(StoredText):
    """One-hot rows that only choose the output channel of a head that reads no text. Our choice."""

    one_hot = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`none` has no settings."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def width(self, num_labels: int) -> int:
        """Returns one column per label."""
        return num_labels
