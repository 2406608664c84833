"""A text tower from the Hugging Face Hub: loading by id and revision, caching, and embedding in batches."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mome.encoders.text.base import TextEncoder
from mome.errors import InputError
from mome.hub_connection import hub_answers
from mome.registry import at_least

# The sentence of the CLIP-Driven Universal Model (Liu et al. 2023).
TEMPLATE = "A computerized tomography of a {}"

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip


class TextTower(TextEncoder):
    """The part that towers from the Hub share. A tower is loaded at the first `encode` and is no part of a MoME model.

    Args:
        model: Hub id or a folder.
        revision: Commit, tag or branch.
        normalize: Whether rows are scaled to unit length.
        template: Sentence around a prompt; `{}` is the prompt.
        max_length: Number of tokens that are kept.
        width: Width T of the rows; 0 reads it from the model's config.
    """

    needs_tower = True

    def __init__(
        self, *, model: str, revision: str, normalize: bool, template: str, max_length: int, width: int
    ) -> None:
        at_least(0, "a text tower", width=width)
        at_least(1, "a text tower", max_length=max_length)
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise InputError(
                f"the template has no {{}} for the prompt, or other braces: {template!r}",
                where=f"text tower {model}",
            )
        self.model_id, self.revision, self.normalize, self.template = model, revision, normalize, template
        self.max_length, self.known_width = max_length, width
        self._tower: tuple[Any, Any] | None = None

    def width(self, num_labels: int) -> int:
        """Returns the width T of the rows; the Hub is asked only where the config does not say."""
        if self.known_width:
            return self.known_width
        from transformers import AutoConfig

        return int(self._load(AutoConfig).hidden_size)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Embeds texts as rows (P, T), float32 on the CPU.

        Raises:
            InputError: The tower is not in the cache and the Hub cannot be reached.
        """
        if self._tower is None:
            self._tower = self._open()
        tokenizer, model = self._tower
        rows = [torch.empty(0, self.width(0))]
        for start in range(0, len(texts), 32):
            sentences = [self.template.format(text) for text in texts[start : start + 32]]
            tokens = tokenizer(
                sentences,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            self._check_tokens(tokenizer, tokens, sentences)
            row = self._pool(model, tokens).float()
            rows.append(torch.nn.functional.normalize(row, dim=-1) if self.normalize else row)
        return torch.cat(rows)

    def _open(self) -> tuple[Any, Any]:
        """Loads the tokenizer and the model."""
        raise NotImplementedError

    def _pool(self, model: Any, tokens: Any) -> Tensor:
        """Runs the tower: tokens of P sentences → rows (P, T)."""
        raise NotImplementedError

    def _check_tokens(self, tokenizer: Any, tokens: Any, sentences: list[str]) -> None:
        """Refuses sentences without a known token: a tokenizer without its vocabulary gives no error of its own."""
        known = tokens["attention_mask"].bool() & ~torch.isin(
            tokens["input_ids"], torch.tensor(sorted(tokenizer.all_special_ids))
        )
        if not known.any(1).all():
            sentence = sentences[int((~known.any(1)).nonzero()[0])]
            raise InputError(
                f"the text tower's tokenizer knows nothing of {sentence!r:.80}",
                where=f"text tower {self.model_id}",
                hint=f"is its vocabulary there? hf download {self.model_id} --revision {self.revision}",
            )

    def _is_cached(self) -> bool:
        """Whether the cache holds the weights and the vocabulary of exactly this commit.

        Both are looked for because an interrupted download may have left one without the other.
        """
        if not re.fullmatch("[0-9a-f]{40}", self.revision):
            return False
        import huggingface_hub

        def any_of(names: tuple[str, ...]) -> bool:
            find = functools.partial(huggingface_hub.try_to_load_from_cache, self.model_id, revision=self.revision)
            return any(isinstance(find(name), str) for name in names)

        return any_of(_WEIGHTS) and any_of(_VOCABULARIES)

    def _load(self, factory: Any) -> Any:
        wanted = {"pretrained_model_name_or_path": self.model_id, "revision": self.revision}
        if self._is_cached():
            # A commit never changes, so the cached files are used without asking the Hub.
            # `local_files_only` alone lets transformers ask the Hub for an adapter.
            with contextlib.suppress(OSError, ValueError), _offline():
                return factory.from_pretrained(**wanted, local_files_only=True)
        is_local = Path(self.model_id).is_dir()
        try:
            with contextlib.nullcontext() if is_local or hub_answers() else _offline():
                return factory.from_pretrained(**wanted)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the text tower {self.model_id!r} (revision {self.revision}) cannot be loaded: "
                + str(error).splitlines()[0][:120],
                hint=f"hf download {self.model_id} --revision {self.revision}, or use known labels only",
            ) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Makes the Hub's library use its cache only, which still resolves branches and tags."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
