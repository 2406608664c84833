"""What text encoders without a tower share."""

from __future__ import annotations

from torch import Tensor

from mome.encoders.text.base import TextEncoder
from mome.errors import InputError


class StoredText(TextEncoder):
    """A text encoder without a tower, which cannot embed anything."""

    def encode(self, texts: list[str]) -> Tensor:
        """Raises an error, because there is no tower.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"this model stores its labels' embeddings only; {', '.join(texts[:3])!r} is not among them",
            hint="prompt one of its labels (mome info MODEL), or build it with text_encoder='hf(...)'",
        )
