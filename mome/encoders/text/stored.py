"""Text encoders without a tower: a stored bank, rows learned with the model, no text at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.encoders.text.base import TextEncoder
from mome.errors import InputError
from mome.registry import at_least


class StoredText(TextEncoder):
    """The part that text encoders without a tower share: they cannot embed anything."""

    def encode(self, texts: list[str]) -> Tensor:
        """Raises an error, because there is no tower.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"this model stores its labels' embeddings only; {', '.join(texts[:3])!r} is not among them",
            hint="prompt one of its labels (mome info MODEL), or build it with text_encoder='hf(...)'",
        )


class BankText(StoredText):
    """Embeddings that were made elsewhere; only labels in the checkpoint's bank can be prompted."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `bank`.

        Args:
            width: Width T of the stored rows.
        """

        width: int = 512

    def __init__(self, config: Config) -> None:
        at_least(1, "bank", width=config.width)
        self.config = config

    def width(self, num_labels: int) -> int:
        return self.config.width


class LearnedText(StoredText):
    """One-hot rows over the labels: the layers that read them act as a table of learned rows."""

    one_hot = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`learned` has no settings."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def width(self, num_labels: int) -> int:
        """Returns one column per label."""
        return num_labels


class NoText(StoredText):
    """One-hot rows that only choose the output channel of a head that reads no text."""

    one_hot = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`none` has no settings."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def width(self, num_labels: int) -> int:
        """Returns one column per label."""
        return num_labels
