"""The text half of a CLIP model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mome.encoders.text.hub_tower import HubTower
from mome.encoders.text.templates import TEMPLATE

# CLIP's own limit.
_MAX_LENGTH = 77


class CLIPText(HubTower):
    """The projected text embedding of a CLIP model (Radford et al. 2021, arXiv 2103.00020).

    The CLIP-Driven Universal Model uses it (Liu et al. 2023, arXiv 2301.00785).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `clip`; pooling and projection are CLIP's own.

        Args:
            model: Hub id or a folder.
            revision: Commit, tag or branch; a commit makes runs repeatable.
            normalize: Whether rows are scaled to unit length.
            template: Sentence around a prompt, or its name (`universal_model`, `prompt_only`); `{}` is the prompt.
            templates: An ensemble of templates instead of one: a row is the mean of their normalised embeddings.
            width: Width T of the rows; 0 reads it from the model's config.
        """

        model: str = "openai/clip-vit-base-patch32"
        revision: str = "main"
        normalize: bool = False
        template: str = TEMPLATE
        templates: tuple[str, ...] = ()
        width: int = 512

    def __init__(self, config: Config) -> None:
        super().__init__(
            model=config.model,
            revision=config.revision,
            normalize=config.normalize,
            template=config.template,
            templates=config.templates,
            max_length=_MAX_LENGTH,
            width=config.width,
        )

    def _read_width(self) -> int:
        return int(self._load_config().projection_dim)

    def _open(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        options, config = {}, self._load_config()
        if hasattr(config, "text_config"):  # a whole CLIP model, whose own width its text half need not repeat
            config.text_config.projection_dim = config.projection_dim
            options["config"] = config.text_config
        return self._load(AutoTokenizer), self._load_model(CLIPTextModelWithProjection, **options)

    def _pool(self, model: Any, tokens: dict[str, Tensor]) -> Tensor:
        return model(**tokens).text_embeds
