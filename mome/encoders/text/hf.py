"""Any text model of the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome.encoders.text.tower import TEMPLATE, TextTower
from mome.errors import InputError


class HuggingFaceText(TextTower):
    """Any text model that `AutoModel` loads: encoder models, sentence embedders, language models."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `hf`.

        Args:
            model: Hub id or a folder.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            pooling: `mean` over the tokens, `cls` (first token), `last` token, or `pooler` (the model's own).
            normalize: Whether rows are scaled to unit length.
            template: Sentence around a prompt; `{}` is the prompt.
            max_length: Number of tokens that are kept.
            width: Width T of the rows; 0 reads it from the model's config.
        """

        model: str = "sentence-transformers/all-MiniLM-L6-v2"
        revision: str = "main"
        pooling: str = "mean"
        normalize: bool = True
        template: str = TEMPLATE
        max_length: int = 77
        width: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(
            model=config.model,
            revision=config.revision,
            normalize=config.normalize,
            template=config.template,
            max_length=config.max_length,
            width=config.width,
        )
        self.pooling = config.pooling
        if self.pooling not in ("mean", "cls", "last", "pooler"):
            raise InputError(
                f"pooling is one of mean, cls, last, pooler, got {self.pooling!r}",
                where=f"text tower {config.model}",
            )

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        return self._load(AutoTokenizer), self._load(AutoModel).eval()

    def _pool(self, model: Any, tokens: Any) -> Tensor:
        output = model(**tokens)
        if self.pooling == "pooler":
            return output.pooler_output
        hidden_PND, mask_PN = output.last_hidden_state, tokens["attention_mask"]
        if self.pooling == "cls":
            return hidden_PND[:, 0]
        if self.pooling == "last":
            last_P = mask_PN.shape[1] - 1 - mask_PN.flip(1).argmax(1)
            return hidden_PND[torch.arange(hidden_PND.shape[0]), last_P]
        mask_PN1 = mask_PN[..., None].to(hidden_PND.dtype)
        return (hidden_PND * mask_PN1).sum(1) / mask_PN1.sum(1)
