"""The saved configuration of a MoME model: every part as a validated spec."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mome.checksums import CHECKSUMS, WEIGHTS, changed_file, changed_keys, sums_of
from mome.errors import InputError, did_you_mean
from mome.experts.whole_model_reference import references
from mome.json_file import checked_object, read_json_object
from mome.labels.characters import LONGEST_PROMPT
from mome.model_size import numbers_within
from mome.registry import LOSSES, PARTS, TEXT_ENCODERS
from mome.spec import SPEC_VERSION, Spec, dump, migrate

# The parts of a model whose config does not name them.
_DEFAULT_PARTS = {
    "encoder": "unet",
    "text_encoder": "bank",
    "experts": "linear",
    "router": "topk",
    "fusion": "text_guided",
    "head": "dynamic",
}

_DEFAULT_LOSS = "bce_dice"

# Keys that transformers itself passes through a config; any other key that is not a field is a typo.
_HUGGING_FACE_KEYS = {
    "model_type", "auto_map", "torch_dtype", "dtype", "name_or_path", "attn_implementation",
    "experts_implementation", "num_labels", "quantization_config", "transformers_version", "architectures",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder",
    "id2label", "label2id", "problem_type", "tie_word_embeddings", "use_cache", "trust_remote_code",
}  # fmt: skip

# Keys of a config.json beside the fields of `MoMEConfig` that are read from the file.
_FILE_KEYS = {"model_type", "dtype", "torch_dtype", "transformers_version"}
_DTYPES = ("float32", "float64", "float16", "bfloat16")
# The largest whole number that a config or the spec of a part may hold, and the most voxels of a patch (512³). Our
# choice; the sizes that follow from them are checked when the model is built.
_MAX_NUMBER = 2**20
_MAX_PATCH_VOXELS = 2**27
_MOST_SYNONYMS = 10_000


class MoMEConfig(PreTrainedConfig):
    """Everything that decides a model's architecture.

    Args:
        encoder, text_encoder, experts, router, fusion, head: Specs (a string, a dict, a part's Config object or a
            module object); stored as full dicts.
        labels: Names whose text embeddings the checkpoint stores, in the order of its bank.
        trained_labels: Names that the weights were trained on; empty for random weights.
        synonyms: Other words for labels that the class table does not have, as in `{"thymus": ["thymic gland"]}`.
        text_dim: Width T of the text rows; found from `text_encoder` where None.
        dim: Width of the voxels inside the scale experts.
        residual: Whether the scale layers add the experts' result to what the experts read. None means yes, except for
            `linear` experts, for which x + W x is another W x.
        head_channels: Width C of the fused features (8 in the CLIP-Driven Universal Model).
        in_channels: Channels of the volume, 1 for CT.
        patch_size: Voxels (D, H, W) of a training patch and of an inference tile, on the network grid.
        extra_experts: Whole segmentation models that join the fusion (`mome.experts.whole_model.WholeModel`); stored
            as their kinds, classes, spacings and hashes.
        loss: Spec of the segmentation loss that `forward` computes where targets are given, a name of `mome.losses`;
            None is `bce_dice`.
        spec_version: Version of the spec grammar and of the parts' arguments.

    Raises:
        InputError: An unknown part, argument or key, a value of the wrong type, or parts that do not fit together.
    """

    model_type = "mome"

    encoder: Any = None
    text_encoder: Any = None
    experts: Any = None
    router: Any = None
    fusion: Any = None
    head: Any = None
    labels: list[str] | tuple[str, ...] = ()
    trained_labels: list[str] | tuple[str, ...] = ()
    synonyms: dict[str, list[str]] | None = None
    text_dim: int | None = None
    dim: int = 48
    residual: bool | None = None
    head_channels: int = 8
    in_channels: int = 1
    patch_size: list[int] | tuple[int, ...] = (96, 96, 96)
    extra_experts: Any = ()
    loss: Any = None
    initializer_range: float = 0.02
    spec_version: int = SPEC_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown(kwargs)
        kwargs.pop(CHECKSUMS, None)
        kwargs.pop("num_labels", None)  # transformers would make a table of that many names, which nothing reads
        self._check_types()
        for part, registry in PARTS.items():
            given = getattr(self, part)
            spec: str | Spec | Any = _DEFAULT_PARTS[part] if given is None else given
            if isinstance(spec, dict):
                spec = migrate(spec, self.spec_version)
            setattr(self, part, registry.canonical(spec))
            numbers_within(_MAX_NUMBER, getattr(self, part), part)
        self.loss = LOSSES.canonical(_DEFAULT_LOSS if self.loss is None else self.loss)
        self.spec_version = SPEC_VERSION
        if self.residual is None:
            self.residual = self.experts["name"] != "linear"
        self.labels, self.trained_labels = list(self.labels), list(self.trained_labels)
        self.synonyms = {label: list(words) for label, words in (self.synonyms or {}).items()}
        self.patch_size = list(self.patch_size)
        self.extra_experts = references(self.extra_experts)
        if self.text_dim is None:
            self.text_dim = TEXT_ENCODERS.build(self.text_encoder).width(len(self.labels))
        self.check_labels()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds a config from the contents of a config.json; values of the config in `kwargs` override them.

        Raises:
            InputError: See `keys_of_file` and the class; or a value was changed since the file was saved.
        """
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in _own_fields()}
        config = super().from_dict({**keys_of_file(config_dict), **overrides}, **kwargs)
        changed = changed_keys(summed_keys(config_dict), config_dict.get(CHECKSUMS), overrides)
        if changed:
            raise changed_file(
                [f"{key} in config.json" for key in changed], kwargs.get("name_or_path") or "config.json"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json holds; `extra_experts`, `synonyms` and another `loss` only where there are some."""
        values = super().to_dict()
        if values.get("loss") == LOSSES.canonical(_DEFAULT_LOSS):
            values.pop("loss")
        for key in ("extra_experts", "synonyms"):
            if not values.get(key):
                values.pop(key, None)
        return values

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes config.json with its checksums; that of the weights beside it stays."""
        path = Path(json_file_path)
        values = json.loads(self.to_json_string(use_diff=use_diff))
        sums: dict[str, Any] = sums_of(summed_keys(values))
        with contextlib.suppress(InputError):  # there is no file yet, or none that can be read
            before = read_json_object(path).get(CHECKSUMS)
            if isinstance(before, dict) and WEIGHTS in before:
                sums[WEIGHTS] = before[WEIGHTS]
        path.write_text(json.dumps({**values, CHECKSUMS: sums}, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _check_types(self) -> None:
        # huggingface_hub's @strict skips annotations that are strings, and its messages are written for programmers.
        for key in ("labels", "trained_labels"):
            names = getattr(self, key)
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
                raise InputError(f"{key} is a list of names, got {names!r:.60}", hint=f"{key}=['liver', 'spleen']")
        self._check_synonyms()
        patch = self.patch_size
        if not isinstance(patch, list | tuple) or len(patch) != 3 or not all(_is_count(side) for side in patch):
            raise InputError(
                f"patch_size is three numbers of voxels, got {patch!r:.60}", hint="patch_size=[96, 96, 96]"
            )
        if math.prod(patch) > _MAX_PATCH_VOXELS:
            raise InputError(
                f"patch_size {list(patch)!r:.60} is {math.prod(patch):,} voxels, the limit is {_MAX_PATCH_VOXELS:,}",
                hint="patch_size=[96, 96, 96]",
            )
        for key in ("dim", "head_channels", "in_channels", "spec_version"):
            if not _is_count(getattr(self, key)):
                raise InputError(f"{key} is a whole number of at least 1, got {getattr(self, key)!r:.60}")
            numbers_within(_MAX_NUMBER, getattr(self, key), key)
        if self.residual is not None and not isinstance(self.residual, bool):
            raise InputError(f"residual is true, false or None, got {self.residual!r:.60}")
        if self.text_dim is not None and not _is_count(self.text_dim):
            raise InputError(f"text_dim is a whole number of at least 1, or None, got {self.text_dim!r:.60}")
        numbers_within(_MAX_NUMBER, self.text_dim, "text_dim")
        std = self.initializer_range
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
            raise InputError(f"initializer_range is a positive number, got {std!r:.60}")

    def _check_synonyms(self) -> None:
        given = {} if self.synonyms is None else self.synonyms
        lists = list(given.values()) if isinstance(given, dict) else [None]
        texts = [word for words in lists for word in (words if isinstance(words, list | tuple) else [None])]
        if not all(isinstance(word, str) and 0 < len(word) <= LONGEST_PROMPT for word in texts):
            raise InputError(
                f"synonyms are lists of texts by label, got {given!r:.80}", hint="synonyms={'thymus': ['thymic gland']}"
            )
        if len(texts) > _MOST_SYNONYMS:  # a prompt is compared with every one of them
            raise InputError(f"synonyms has {len(texts):,} texts, the limit is {_MOST_SYNONYMS:,}")

    def check_labels(self) -> None:
        """Checks the labels against each other, their synonyms, and the text rows.

        Raises:
            InputError: A label is repeated, a trained label or one with synonyms is missing, or there are more labels
                than one-hot columns.
        """
        nameless = [name for name in self.synonyms or () if name not in self.labels]
        if nameless:
            raise InputError(f"synonyms has words for {nameless[:4]}, which are not among the labels of the bank")
        unknown = [name for name in self.trained_labels if name not in self.labels]
        if unknown:
            raise InputError(
                f"trained_labels {unknown} are not among the labels of the bank", hint="add them to labels"
            )
        if len(set(self.labels)) != len(self.labels):
            raise InputError("a label stands twice in labels", hint="name every label once")
        name = self.text_encoder["name"]
        if not self.text_dim:
            raise InputError(f"text encoder '{name}' has one row per label, and there are no labels", hint="labels=[…]")
        if self.has_one_hot_text and len(self.labels) > self.text_dim:
            raise InputError(
                f"text encoder '{name}' tells text_dim={self.text_dim} labels apart, got {len(self.labels)}",
                hint=f"text_dim={len(self.labels)}; layers that read text are then new",
            )

    def set_labels(self, labels: list[str], trained_labels: list[str]) -> None:
        """Sets both lists, or neither if they are invalid. Labels that are left out lose their synonyms.

        Raises:
            InputError: See `check_labels`.
        """
        before = self.labels, self.trained_labels, self.synonyms
        self.labels, self.trained_labels = labels, trained_labels
        try:
            self._check_types()
            self.labels, self.trained_labels = list(labels), list(trained_labels)
            self.synonyms = {label: words for label, words in (self.synonyms or {}).items() if label in self.labels}
            self.check_labels()
        except InputError:
            self.labels, self.trained_labels, self.synonyms = before
            raise

    @property
    def has_one_hot_text(self) -> bool:
        """Whether text rows only number the labels (`learned`, `none`)."""
        encoder_class, _ = TEXT_ENCODERS.resolve(self.text_encoder)
        return getattr(encoder_class, "one_hot", False)

    def part_strings(self) -> dict[str, str]:
        """Returns every part as the string that a user would type; defaults are left out."""
        return {part: dump(getattr(self, part), registry) for part, registry in PARTS.items()}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _own_fields() -> set[str]:
    """The fields that `MoMEConfig` itself declares."""
    return set(MoMEConfig.__annotations__) - {"model_type"}


def summed_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a config.json that have checksums, which are those that decide what a model computes."""
    kept = _own_fields() | {"dtype", "torch_dtype"}
    return {key: value for key, value in raw.items() if key in kept}


def keys_of_file(raw: Any, where: str = "config.json") -> dict[str, Any]:
    """Returns the keys of a config.json that describe a MoME; the file may come from anybody.

    The keys through which transformers chooses code are dropped: `attn_implementation` and `experts_implementation`,
    which can name a kernel of the Hub, `auto_map`, and every key that begins with an underscore. So are its other
    keys, such as `num_labels`, which change nothing here.

    Args:
        raw: What was read from the file.
        where: The place of the file, for errors.

    Raises:
        InputError: The contents are no object, a key is unknown, or it asks for a quantisation or a data type that
            is not read from a file.
    """
    raw = checked_object(raw, "config.json", where)
    if raw.get("quantization_config") is not None:
        raise InputError(
            "config.json asks for a quantization_config, which is not read from a file",
            where=where,
            hint="remove the key, and pass quantization_config= to from_pretrained",
        )
    _reject_unknown(raw)
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) is not None and raw[key] not in _DTYPES:
            raise InputError(f"{key} is one of {', '.join(_DTYPES)}, got {raw[key]!r:.60}", where=where)
    kept = _own_fields() | _FILE_KEYS
    return {key: value for key, value in raw.items() if key in kept}


def _reject_unknown(kwargs: dict[str, Any]) -> None:
    """Refuses unknown keys, which Hugging Face would keep without a word, so that a typo cannot change a model."""
    known = {field.name for field in fields(MoMEConfig)}
    for key in kwargs:
        if key in known or key in _HUGGING_FACE_KEYS or key == CHECKSUMS or key.startswith("_"):
            continue
        raise InputError(
            f"a MoME config has no {key!r:.60}{did_you_mean(key[:60], sorted(known))}",
            hint="keys: " + ", ".join(sorted(PARTS) + ["labels", "dim", "head_channels", "patch_size", "text_dim"]),
        )
