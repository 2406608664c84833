"""The text half of a CLIP model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mome.encoders.text.tower import TEMPLATE, TextTower

# CLIP's own limit.
_MAX_LENGTH = 77


class CLIPText(TextTower):
    """The projected text embedding of a CLIP model, as the CLIP-Driven Universal Model uses it."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `clip`; pooling and projection are CLIP's own.

        Args:
            model: Hub id or a folder.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            normalize: Whether rows are scaled to unit length.
            template: Sentence around a prompt; `{}` is the prompt.
            width: Width T of the rows; 0 reads it from the model's config.
        """

        model: str = "openai/clip-vit-base-patch32"
        revision: str = "main"
        normalize: bool = False
        template: str = TEMPLATE
        width: int = 512

    def __init__(self, config: Config) -> None:
        super().__init__(
            model=config.model,
            revision=config.revision,
            normalize=config.normalize,
            template=config.template,
            max_length=_MAX_LENGTH,
            width=config.width,
        )

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        return self._load(AutoTokenizer), self._load(CLIPTextModelWithProjection).eval()

    def _pool(self, model: Any, tokens: Any) -> Tensor:
        return model(**tokens).text_embeds
