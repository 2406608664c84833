"""The contract of a text encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor


class TextEncoder:
    """Turns words into rows. It stands outside the model, which sees the rows only.

    Attributes:
        needs_tower: Whether free text can be embedded, by a tower that is loaded at the first `encode`.
        one_hot: Whether the rows only number the labels; the model's bank then makes them.
    """

    needs_tower: ClassVar[bool] = False
    one_hot: ClassVar[bool] = False

    def width(self, num_labels: int) -> int:
        """Returns the width T of the rows of a model with `num_labels` labels."""
        raise NotImplementedError

    def encode(self, texts: list[str]) -> Tensor:
        """Embeds texts as rows (P, T), float32 on the CPU.

        Raises:
            InputError: There is no tower, or it cannot be loaded.
        """
        raise NotImplementedError
