"""The text half of an open_clip model, such as BiomedCLIP."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mome.encoders.text.templates import TEMPLATE
from mome.encoders.text.tower import TextTower
from mome.errors import InputError
from mome.hub_connection import hub_answers

_BATCH = 32
_DAMAGED = (SafetensorError, pickle.UnpicklingError)
_CONFIG = "open_clip_config.json"
_SMALL_FILES = (_CONFIG, "*tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


class OpenCLIPText(TextTower):
    """The projected text embedding of an open_clip model; its image tower is dropped after loading.
    BiomedCLIP is such a model (Zhang et al. 2023, arXiv 2303.00915).

    Weights are safetensors, or torch files that are read with `weights_only=True`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `open_clip`; pooling and projection are the model's own.

        Args:
            model: Hub id or a folder that holds open_clip_config.json, the weights and the tokenizer's files.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            normalize: Whether rows are scaled to unit length.
            template: Sentence around a prompt, or its name (`universal_model`, `prompt_only`); `{}` is the prompt.
            templates: An ensemble of templates instead of one: a row is the mean of their normalised embeddings.
            width: Width T of the rows; 0 reads it from the model's config.
        """

        model: str = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
        revision: str = "main"
        normalize: bool = True
        template: str = TEMPLATE
        templates: tuple[str, ...] = ()
        width: int = 512

    def __init__(self, config: Config) -> None:
        super().__init__(
            model=config.model,
            normalize=config.normalize,
            template=config.template,
            templates=config.templates,
            width=config.width,
        )
        self.revision = config.revision

    @functools.cached_property
    def _tower(self) -> tuple[Any, Any]:
        """The tokenizer and the model without its image tower."""
        try:
            open_clip = importlib.import_module("open_clip")
        except ImportError as error:
            raise InputError(
                f"text encoder 'open_clip' needs {error.name or error}, which is not installed",
                where=self._where(),
                hint="pip install 'mome[open_clip]'",
            ) from error
        name = f"local-dir:{self._folder}"
        try:
            # Without require_pretrained a folder without weights would give a random model.
            model = open_clip.create_model(
                name, require_pretrained=True, pretrained_image=False, pretrained_text=False, weights_only=True
            )
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError, *_DAMAGED) as error:
            raise self._not_loaded(error) from error
        del model.visual
        return tokenizer, model.eval()

    def _embed(self, sentences: list[str]) -> Tensor:
        tokenizer, model = self._tower
        length = int(tokenizer.context_length)  # that of a model with a transformers tower may be larger
        tokens_PN = tokenizer(sentences, context_length=length)
        # open_clip cuts long texts without a word. One more place changes the tokens of a text that was cut.
        is_cut_P = (tokenizer(sentences, context_length=length + 1)[:, :length] != tokens_PN).any(1)
        if is_cut_P.any():
            sentence = sentences[int(is_cut_P.nonzero()[0])]
            raise InputError(
                f"the text tower reads at most {length} tokens, the text has more: {sentence!r:.60}",
                where=self._where(),
                hint="a shorter text",
            )
        return torch.cat([model.encode_text(part).float() for part in tokens_PN.split(_BATCH)])

    def _read_width(self) -> int:
        try:
            return int(json.loads((self._folder / _CONFIG).read_text())["model_cfg"]["embed_dim"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._not_loaded(error) from error

    def _identity(self) -> tuple[Mapping[str, Tensor], Mapping[str, int]]:
        tokenizer, model = self._tower
        vocabulary = tokenizer.tokenizer.get_vocab() if hasattr(tokenizer, "tokenizer") else tokenizer.encoder
        return model.state_dict(), vocabulary

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder of the model, downloaded where `model` is a Hub id."""
        if Path(self.model_id).is_dir():
            return Path(self.model_id)
        if re.fullmatch("[0-9a-f]{40}", self.revision):  # a commit never changes, so the Hub need not be asked
            with contextlib.suppress(OSError, ValueError):
                folder = self._download(local_files_only=True)
                if (folder / _CONFIG).is_file() and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
                    return folder
        try:
            return self._download(local_files_only=not hub_answers())
        except (OSError, ValueError) as error:
            raise self._not_loaded(error) from error

    def _download(self, *, local_files_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        def get(*patterns: str) -> Path:
            return Path(
                snapshot_download(
                    self.model_id,
                    revision=self.revision,
                    allow_patterns=list(patterns),
                    local_files_only=local_files_only,
                )
            )

        folder = get(*_SMALL_FILES, "open_clip*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else get(*_SMALL_FILES, "open_clip*.bin")

    def _not_loaded(self, error: Exception) -> InputError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return InputError(
            f"the text tower {self.model_id!r} (revision {self.revision}) cannot be loaded: {reason}",
            hint=f"hf download {self.model_id} --revision {self.revision}, or use known labels only",
        )
