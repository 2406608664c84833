"""Any text model of the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome.encoders.text.hub_tower import HubTower
from mome.encoders.text.templates import TEMPLATE
from mome.errors import InputError, did_you_mean

POOLINGS = ("mean", "cls", "last", "pooler", "last_token", "eos")


class HuggingFaceText(HubTower):
    """Any text model that `AutoModel` loads: encoder models, sentence embedders, language models. Our choice.

    The pooling is the one that the model's card names: BiomedBERT `cls`, the sentence-transformers family mostly
    `mean`, Qwen3-Embedding `last_token`. Qwen3-Embedding's card puts an instruction before a query:
    `instruction="Instruct: Name the organ\\nQuery:"`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `hf`.

        Args:
            model: Hub id or a folder.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            pooling: `mean` over the tokens, `cls` (first token), `last_token` (also called `last`), `eos` (the first
                end token), or `pooler` (the model's own).
            normalize: Whether rows are scaled to unit length.
            template: Sentence around a prompt, or its name (`universal_model`, `prompt_only`); `{}` is the prompt.
            templates: An ensemble of templates instead of one: a row is the mean of their normalised embeddings.
            instruction: Text that stands before every sentence as it is.
            max_length: The most tokens of a sentence; a longer one is refused.
            width: Width T of the rows; 0 reads it from the model's config.
        """

        model: str = "sentence-transformers/all-MiniLM-L6-v2"
        revision: str = "main"
        pooling: str = "mean"
        normalize: bool = True
        template: str = TEMPLATE
        templates: tuple[str, ...] = ()
        instruction: str = ""
        max_length: int = 77
        width: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(
            model=config.model,
            revision=config.revision,
            normalize=config.normalize,
            template=config.template,
            templates=config.templates,
            instruction=config.instruction,
            max_length=config.max_length,
            width=config.width,
        )
        self.pooling = config.pooling
        if self.pooling not in POOLINGS:
            raise InputError(
                f"pooling is one of {', '.join(POOLINGS)}, got {self.pooling!r}{did_you_mean(self.pooling, POOLINGS)}",
                where=self._where(),
            )

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = self._load(AutoTokenizer), self._load_model(AutoModel)
        if self.pooling == "eos" and tokenizer.eos_token_id is None:
            raise InputError(
                "the text tower's tokenizer has no end token",
                where=self._where(),
                hint="pooling='last_token', or the pooling of the model's card",
            )
        return tokenizer, model

    def _pool(self, model: Any, tokens: dict[str, Tensor]) -> Tensor:
        try:
            output = model(**tokens)
        except (AttributeError, TypeError, ValueError) as error:  # what a forward pass raises that misses an input
            raise InputError(
                f"{type(model).__name__} does not run on text alone: {(str(error).splitlines() or [''])[0][:100]}",
                where=self._where(),
                hint="clip(model=…) for a CLIP model, else a text encoder or a language model",
            ) from error
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise InputError(
                    "the text tower has no pooler", where=self._where(), hint="pooling='mean', 'cls' or 'last_token'"
                )
            return output.pooler_output
        hidden_PND = output.last_hidden_state
        if self.pooling == "cls":
            return hidden_PND[:, 0]
        if self.pooling in ("last", "last_token"):
            return hidden_PND[:, -1]
        if self.pooling == "eos":
            return hidden_PND[torch.arange(hidden_PND.shape[0]), self._end_P(tokens["input_ids"])]
        return hidden_PND.mean(1)

    def _end_P(self, ids_PN: Tensor) -> Tensor:
        """The place (P,) of the first end token of every sentence."""
        is_end_PN = ids_PN == self._tower[0].eos_token_id
        if not is_end_PN.any(1).all():
            raise InputError(
                "the text tower's tokenizer puts no end token behind a sentence",
                where=self._where(),
                hint="pooling='last_token', or the pooling of the model's card",
            )
        return is_end_PN.int().argmax(1)
