"""The contract of a text encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mome.errors import InputError


class TextEncoder:
    """Turns words into rows. It stands outside the model, which sees the rows only.

    Attributes:
        needs_tower: Whether free text can be embedded, by a tower that is loaded at the first `encode`.
        one_hot: Whether the rows only number the labels; the model's bank then makes them.
        learned_width: Width of the rows that the model's bank learns for one-hot rows; 0 where it learns none.
    """

    needs_tower: ClassVar[bool] = False
    one_hot: ClassVar[bool] = False
    learned_width: int = 0

    def width(self, num_labels: int) -> int:
        """Returns the width T of the rows of a model with `num_labels` labels."""
        raise NotImplementedError

    def encode(self, texts: list[str]) -> Tensor:
        """Embeds texts as rows (P, T), float32 on the CPU.

        Raises:
            InputError: There is no tower, or it cannot be loaded.
        """
        raise NotImplementedError

    def stored_labels(self) -> list[str]:
        """Returns the labels whose rows a file of the encoder holds; empty where it has no file."""
        return []


def check_width(rows_PT: Tensor, width: int, encoder: str) -> Tensor:
    """Returns rows (P, T) whose width is the one that a model was built for.

    Args:
        rows_PT: What a text encoder gave.
        width: T of the model.
        encoder: The text encoder in words, for the error.

    Raises:
        InputError: The width is another one: the text encoder is not the one that the model was built with.
    """
    if rows_PT.ndim != 2 or rows_PT.shape[1] != width:
        raise InputError(
            f"the text encoder gives rows of width {rows_PT.shape[-1]}, this model reads rows of width {width}",
            where=encoder,
            hint="use the text encoder (model and revision) that the model was built with, or build a new model",
        )
    return rows_PT
