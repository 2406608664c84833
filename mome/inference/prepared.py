"""Prompts that were understood and embedded once, for any number of scans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mome.prompts import Prompt


@dataclass(frozen=True)
class PreparedPrompts:
    """What `Segmenter.prepare` returns and `Segmenter.segment` accepts in place of texts.

    Attributes:
        prompts: The prompts as the model understands them, each once.
        text_PT: Their embeddings (P, T), float32; (P, 2, T) where left and right are mirrored.
        model: The model that they were embedded for; None where nobody says.
        mirror: The axes along which tiles are mirrored.
    """

    prompts: list[Prompt]
    text_PT: Tensor
    model: Any = field(default=None, repr=False, compare=False)
    mirror: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the masks."""
        return [prompt.name for prompt in self.prompts]
