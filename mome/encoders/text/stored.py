"""Text encoders without a tower: a stored bank, rows learned with the model, no text at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mome.errors import InputError
from mome.registry import at_least


class BankText:
    """Embeddings that somebody else made; the checkpoint's bank is all there is."""

    needs_tower = False
    one_hot = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Width T of the stored rows."""

        width: int = 512

    def __init__(self, config: Config) -> None:
        at_least(1, "bank", width=getattr(config, "width", 1))  # the one-hot encoders below have none
        self.config = config

    def width(self, num_labels: int) -> int:
        """T of the rows."""
        return self.config.width

    def encode(self, texts: list[str]) -> Tensor:
        """There is no tower here.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"this model stores its labels' embeddings only; {', '.join(texts[:3])!r} is not among them",
            hint="prompt one of its labels (mome info MODEL), or build it with text_encoder='hf(...)'",
        )


class LearnedText(BankText):
    """One-hot rows over the labels: the layers that read them are then a learned table."""

    one_hot = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to set."""

    def width(self, num_labels: int) -> int:
        """One column per label."""
        return num_labels


class NoText(LearnedText):
    """The same rows, for a head that reads no text: they only choose the output channel."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Nothing to set."""
