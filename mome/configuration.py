"""The saved configuration of a MoME model: every part as a validated spec."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mome.errors import InputError
from mome.registry import ENCODERS, EXPERTS, FUSIONS, HEADS, ROUTERS, TEXT_ENCODERS
from mome.spec import SPEC_VERSION, dump, migrate

PARTS = {
    "encoder": ENCODERS,
    "text_encoder": TEXT_ENCODERS,
    "experts": EXPERTS,
    "router": ROUTERS,
    "fusion": FUSIONS,
    "head": HEADS,
}

# What transformers itself passes through a config; everything else that is not a field is a typo.
_HUGGING_FACE_KEYS = {
    "model_type", "auto_map", "torch_dtype", "dtype", "name_or_path", "attn_implementation",
    "experts_implementation", "num_labels", "quantization_config", "transformers_version", "architectures",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "tie_word_embeddings", "use_cache", "trust_remote_code",
}  # fmt: skip


@strict
class MoMEConfig(PreTrainedConfig):
    """Everything that decides a model's architecture.

    Args:
        encoder, text_encoder, experts, router, fusion, head: Specs (a string or a dict); stored as full dicts.
        labels: Names whose text embeddings the checkpoint stores, in the order of its bank.
        trained_labels: Names that the weights were trained on; empty for random weights.
        text_dim: Width T of the text rows; found from `text_encoder` where None.
        dim: Width of the tokens inside the scale experts.
        head_channels: Width C of the fused features (8 in the CLIP-Driven Universal Model).
        in_channels: Channels of the volume, 1 for CT.
        patch_size: Voxels (D, H, W) of a training patch and of an inference tile, on the network grid.
        text_tower_hash: SHA-256 of the text tower's weights that made the bank, where known.
        spec_version: Version of the spec grammar and of the parts' arguments.

    Raises:
        InputError: An unknown part, argument or key, or parts that do not fit together.
    """

    model_type = "mome"

    encoder: dict | str | None = None
    text_encoder: dict | str | None = None
    experts: dict | str | None = None
    router: dict | str | None = None
    fusion: dict | str | None = None
    head: dict | str | None = None
    labels: list[str] | tuple[str, ...] = ()
    trained_labels: list[str] | tuple[str, ...] = ()
    text_dim: int | None = None
    dim: int = 48
    head_channels: int = 8
    in_channels: int = 1
    patch_size: list[int] | tuple[int, ...] = (96, 96, 96)
    text_tower_hash: str | None = None
    initializer_range: float = 0.02
    spec_version: int = SPEC_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown(kwargs)
        defaults = {
            "encoder": "unet",
            "text_encoder": "bank",
            "experts": "linear",
            "router": "topk",
            "fusion": "text_guided",
            "head": "dynamic",
        }
        for part, registry in PARTS.items():
            given = getattr(self, part)
            spec = defaults[part] if given is None else given
            if isinstance(spec, dict):
                spec = migrate(spec, self.spec_version)
            setattr(self, part, registry.canonical(spec))
        self.spec_version = SPEC_VERSION
        self.labels, self.trained_labels = list(self.labels), list(self.trained_labels)
        self.patch_size = list(self.patch_size)
        if self.text_dim is None:
            self.text_dim = TEXT_ENCODERS.build(self.text_encoder).width(len(self.labels))
        self._check_parts_fit()
        super().__post_init__(**kwargs)

    def _check_parts_fit(self) -> None:
        unknown = [name for name in self.trained_labels if name not in self.labels]
        if unknown:
            raise InputError(
                f"trained_labels {unknown} are not among the labels of the bank", hint="add them to labels"
            )
        if len(set(self.labels)) != len(self.labels):
            raise InputError("a label stands twice in labels", hint="name every label once")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise InputError(f"patch_size is three numbers of voxels, got {self.patch_size}")
        head_class, _ = HEADS.resolve(self.head)
        fusion_class, _ = FUSIONS.resolve(self.fusion)
        if not head_class.uses_text and fusion_class.prompt_dependent:
            raise InputError(
                f"head '{self.head['name']}' reads no text, so fusion '{self.fusion['name']}' cannot steer it",
                hint="use fusion='last' or fusion='uniform', or head='dynamic'",
            )

    def part_strings(self) -> dict[str, str]:
        """Every part as the string a user would type, defaults left out."""
        return {part: dump(getattr(self, part), registry) for part, registry in PARTS.items()}


def _reject_unknown(kwargs: dict[str, Any]) -> None:
    """Hugging Face keeps unknown keys silently; a typo must not change a model silently."""
    known = {field.name for field in fields(MoMEConfig)}
    for key in kwargs:
        if key in known or key in _HUGGING_FACE_KEYS or key.startswith("_"):
            continue
        close = difflib.get_close_matches(key, sorted(known), n=1)
        raise InputError(
            f"a MoME config has no '{key}'" + (f", did you mean '{close[0]}'?" if close else ""),
            hint="keys: " + ", ".join(sorted(PARTS) + ["labels", "dim", "head_channels", "patch_size", "text_dim"]),
        )
