"""Text towers from the Hugging Face Hub, by id and revision."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome.errors import InputError
from mome.registry import at_least

# The prompt of the paper's family (CLIP-Driven Universal Model, Liu et al. 2023).
TEMPLATE = "A computerized tomography of a {}"

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip


class HuggingFaceText:
    """Any text model that `AutoModel` loads: encoder models, sentence embedders, language models.

    The tower is loaded at the first `encode` and is never part of a MoME model.
    """

    needs_tower = True
    one_hot = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A text tower.

        Args:
            model: Hub id or a folder.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            pooling: `mean` over the tokens, `cls` (first token), `last` token, or `pooler` (the model's own).
            normalize: Scale rows to unit length.
            template: Sentence around a prompt; `{}` is the prompt.
            max_length: Tokens kept.
            width: Width T of the rows; read from the model's config where 0.
        """

        model: str = "sentence-transformers/all-MiniLM-L6-v2"
        revision: str = "main"
        pooling: str = "mean"
        normalize: bool = True
        template: str = TEMPLATE
        max_length: int = 77
        width: int = 0

    def __init__(self, config: Config) -> None:
        self.config = config
        at_least(0, "a text tower", width=config.width)
        at_least(1, "a text tower", max_length=config.max_length)
        if config.pooling not in ("mean", "cls", "last", "pooler"):
            raise InputError(
                f"pooling is one of mean, cls, last, pooler, got {config.pooling!r}",
                where=f"text tower {config.model}",
            )
        if config.template.count("{}") != 1 or config.template.count("{") != 1 or config.template.count("}") != 1:
            raise InputError(
                f"the template has no {{}} for the prompt, or other braces: {config.template!r}",
                where=f"text tower {config.model}",
            )
        self._tower: tuple[Any, Any] | None = None

    def width(self, num_labels: int) -> int:
        """T of the rows; asks the Hub only where the config does not say."""
        if self.config.width:
            return self.config.width
        from transformers import AutoConfig

        return int(self._load(AutoConfig).hidden_size)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Texts → (P, T) float32 on the CPU.

        Raises:
            InputError: The tower is not in the cache and the Hub cannot be reached.
        """
        if self._tower is None:
            self._tower = self._open()
        tokenizer, model = self._tower
        rows = [torch.empty(0, self.width(0))]
        for start in range(0, len(texts), 32):
            sentences = [self.config.template.format(text) for text in texts[start : start + 32]]
            tokens = tokenizer(
                sentences,
                padding=True,
                truncation=True,
                max_length=self.config.max_length,
                return_tensors="pt",
            )
            self._check_tokens(tokenizer, tokens, sentences)
            row = self._pool(model, tokens).float()
            rows.append(torch.nn.functional.normalize(row, dim=-1) if self.config.normalize else row)
        return torch.cat(rows)

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        return self._load(AutoTokenizer), self._load(AutoModel).eval()

    def _pool(self, model: Any, tokens: Any) -> Tensor:
        output = model(**tokens)
        if self.config.pooling == "pooler":
            return output.pooler_output
        hidden_PND, mask_PN = output.last_hidden_state, tokens["attention_mask"]
        if self.config.pooling == "cls":
            return hidden_PND[:, 0]
        if self.config.pooling == "last":
            last_P = mask_PN.shape[1] - 1 - mask_PN.flip(1).argmax(1)
            return hidden_PND[torch.arange(hidden_PND.shape[0]), last_P]
        share_PN1 = mask_PN[..., None].to(hidden_PND.dtype)
        return (hidden_PND * share_PN1).sum(1) / share_PN1.sum(1)

    def _check_tokens(self, tokenizer: Any, tokens: Any, sentences: list[str]) -> None:
        """A tokenizer without its vocabulary gives every sentence the same tokens, and says nothing."""
        known = tokens["attention_mask"].bool() & ~torch.isin(
            tokens["input_ids"], torch.tensor(sorted(tokenizer.all_special_ids))
        )
        if not known.any(1).all():
            sentence = sentences[int((~known.any(1)).nonzero()[0])]
            raise InputError(
                f"the text tower's tokenizer knows nothing of {sentence!r:.80}",
                where=f"text tower {self.config.model}",
                hint=f"is its vocabulary there? hf download {self.config.model} --revision {self.config.revision}",
            )

    def _is_cached(self) -> bool:
        """Whether the cache holds this very commit, weights and vocabulary.

        A download may have ended between them, and a tokenizer loads without its vocabulary.
        """
        if not re.fullmatch("[0-9a-f]{40}", self.config.revision):
            return False
        import huggingface_hub

        def any_of(names: tuple[str, ...]) -> bool:
            find = functools.partial(
                huggingface_hub.try_to_load_from_cache, self.config.model, revision=self.config.revision
            )
            return any(isinstance(find(name), str) for name in names)

        return any_of(_WEIGHTS) and any_of(_VOCABULARIES)

    def _load(self, factory: Any) -> Any:
        wanted = {"pretrained_model_name_or_path": self.config.model, "revision": self.config.revision}
        if self._is_cached():
            # a commit never changes: where the cache has it, a network that is down must not cost minutes of retries
            with contextlib.suppress(OSError, ValueError):
                return factory.from_pretrained(**wanted, local_files_only=True)
        try:
            return factory.from_pretrained(**wanted)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the text tower {self.config.model!r} (revision {self.config.revision}) cannot be loaded: "
                + str(error).splitlines()[0][:120],
                hint=f"hf download {self.config.model} --revision {self.config.revision}, or use known labels only",
            ) from error


class CLIPText(HuggingFaceText):
    """The projected text embedding of a CLIP model, as the CLIP-Driven Universal Model uses it."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """As for `hf`; CLIP has its own pooling and projection."""

        model: str = "openai/clip-vit-base-patch32"
        revision: str = "main"
        normalize: bool = False
        template: str = TEMPLATE
        width: int = 512

    def __init__(self, config: Config) -> None:
        base = HuggingFaceText.Config(
            model=config.model,
            revision=config.revision,
            normalize=config.normalize,
            template=config.template,
            width=config.width,
        )
        super().__init__(base)

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        return self._load(AutoTokenizer), self._load(CLIPTextModelWithProjection).eval()

    def _pool(self, model: Any, tokens: Any) -> Tensor:
        return model(**tokens).text_embeds
