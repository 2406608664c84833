"""A text tower of transformers: loading by id and revision, caching, and embedding in batches without padding."""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mome.encoders.text.tower import TextTower
from mome.errors import InputError
from mome.hub_connection import hub_answers
from mome.registry import at_least

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
_BATCH = 32
# What transformers raises of files that are missing, damaged or of another model.
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


class HubTower(TextTower):
    """A tower that transformers loads.

    Sentences of equal length run together, so nothing is padded: neither the tokenizer's padding side nor the other
    texts of a batch change a row.

    Code of the tower's repository is never run. Weights are safetensors, or torch files that are read with
    `weights_only=True`. They are computed in float32, however they are stored.

    Args:
        model, normalize, template, templates, instruction, width: See `TextTower`.
        revision: Commit, tag or branch.
        max_length: The most tokens of a sentence; a longer one is refused, because a cut prompt is another prompt.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str,
        normalize: bool,
        template: str,
        templates: Sequence[str] = (),
        instruction: str = "",
        max_length: int,
        width: int,
    ) -> None:
        at_least(1, "a text tower", max_length=max_length)
        super().__init__(
            model=model,
            normalize=normalize,
            template=template,
            templates=templates,
            instruction=instruction,
            width=width,
        )
        self.revision, self.max_length = revision, max_length

    def _open(self) -> tuple[Any, Any]:
        """Loads the tokenizer and the model."""
        raise NotImplementedError

    def _pool(self, model: Any, tokens: dict[str, Tensor]) -> Tensor:
        """Runs the tower: tokens (N, length) of N sentences, none of them padded → rows (N, T)."""
        raise NotImplementedError

    @functools.cached_property
    def _tower(self) -> tuple[Any, Any]:
        return self._open()

    def _embed(self, sentences: list[str]) -> Tensor:
        tokenizer, model = self._tower
        tokens = tokenizer(sentences, padding=False, truncation=False)
        self._check_tokens(tokenizer, model, tokens["input_ids"], sentences)
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(tokens["input_ids"]):
            by_length.setdefault(len(ids), []).append(i)
        rows: dict[int, Tensor] = {}
        for same in by_length.values():
            for start in range(0, len(same), _BATCH):
                chunk = same[start : start + _BATCH]
                batch = {key: torch.tensor([values[i] for i in chunk]) for key, values in tokens.items()}
                rows.update(zip(chunk, self._pool(model, batch).float(), strict=True))
        return torch.stack([rows[i] for i in range(len(sentences))])

    def _check_tokens(self, tokenizer: Any, model: Any, ids: list[list[int]], sentences: list[str]) -> None:
        """Refuses sentences that are too long, and those without a known token.

        A tokenizer without its vocabulary gives no error of its own.
        """
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        longest = min(self.max_length, positions, tokenizer.model_max_length)
        special = set(tokenizer.all_special_ids)
        for sentence, tokens in zip(sentences, ids, strict=True):
            if len(tokens) > longest:
                raise InputError(
                    f"the text has {len(tokens)} tokens, the text tower reads at most {longest}: {sentence!r:.60}",
                    where=self._where(),
                    hint="a shorter text" + (", or a larger max_length" if longest == self.max_length else ""),
                )
            if special.issuperset(tokens):
                raise InputError(
                    f"the text tower's tokenizer knows nothing of {sentence!r:.80}",
                    where=self._where(),
                    hint=f"is its vocabulary there? hf download {self.model_id} --revision {self.revision}",
                )

    def _read_width(self) -> int:
        return int(self._load_config().get_text_config().hidden_size)

    def _identity(self) -> tuple[Mapping[str, Tensor], Mapping[str, int]]:
        tokenizer, model = self._tower
        return model.state_dict(), tokenizer.get_vocab()

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

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        return self._load(AutoConfig)

    def _load_model(self, factory: Any, **options: Any) -> Any:
        return self._load(factory, dtype=torch.float32, weights_only=True, **options).eval()

    def _load(self, factory: Any, **options: Any) -> Any:
        # Without trust_remote_code=False, transformers asks on the terminal whether to run code of the repository.
        wanted = {"revision": self.revision, "trust_remote_code": False, **options}
        wanted["pretrained_model_name_or_path"] = self.model_id
        if self._is_cached():
            # A commit never changes, so the cached files are used without asking the Hub.
            # `local_files_only` alone lets transformers ask the Hub for an adapter.
            with contextlib.suppress(*_UNREADABLE), _offline():
                return factory.from_pretrained(**wanted, local_files_only=True)
        is_local = Path(self.model_id).is_dir()
        try:
            with contextlib.nullcontext() if is_local or hub_answers() else _offline():
                return factory.from_pretrained(**wanted)
        except _UNREADABLE as error:
            raise InputError(
                f"the text tower {self.model_id!r} (revision {self.revision}) cannot be loaded: "
                + (str(error).splitlines() or [type(error).__name__])[0][:120],
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
