"""The training configuration: one YAML file, overridden from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mome.data.augmentation import AugmentationConfig
from mome.data.sampling import SamplingConfig
from mome.errors import InputError


class _Loader(yaml.SafeLoader):
    """Booleans are true and false alone: YAML 1.1 reads `no`, which is a precision here, as one."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    letter: [entry for entry in entries if entry[0] != _BOOL]
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

# Keys that may stand without a section, because they are parts of the model.
MODEL_KEYS = (
    "encoder",
    "text_encoder",
    "experts",
    "router",
    "fusion",
    "head",
    "dim",
    "head_channels",
    "patch_size",
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where cases come from.

    Args:
        kind: `cases` (a folder of cases, see `mome.data.case_folder`) or `phantom` (synthetic).
        folder: Of `cases`; `${NAME}` and `~` are expanded.
        dataset: Name of the label YAML of `cases`.
        weight: How often the source is drawn.
        count: Number of phantoms; of `cases`, 0 takes all.
        seed: Of the first phantom.
    """

    kind: str = "cases"
    folder: str | None = None
    dataset: str | None = None
    weight: float = 1.0
    count: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        samples: Budget in patches, whatever the batch size and the number of processes.
        batch_size: Patches per process and micro-step.
        gradient_accumulation: Micro-steps per optimiser step.
        steps: Optimiser steps; where given it replaces `samples`.
        learning_rate, weight_decay, warmup: AdamW; warm-up as a share of the steps, then a cosine to zero.
        clip_norm: Largest gradient norm; 0 does not clip.
        mixed_precision: `no`, `bf16` or `fp16`.
        channels_last: 5-D tensors with channels last; pays on GPUs with half precision.
        gradient_checkpointing: Recompute the encoder and the experts in the backward pass.
        ema: Decay of an exponential moving average of the weights, which is then what is saved; 0: none.
        seed: Of initialisation, sampling and augmentation.
        checkpoint_every, validate_every, log_every: In optimiser steps; 0 never.
        keep_checkpoints: How many training states stay on disk.
        workers: Processes that load patches; 0 loads in the main process.
        threads: CPU threads of torch; 0 leaves torch's choice.
        out: Folder of the run.
        synonyms: Probability that a prompt's text is one of the label's synonyms instead of its name.
        tracker: `tensorboard` or `none`.
    """

    samples: int = 4000
    steps: int | None = None
    batch_size: int = 2
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip_norm: float = 1.0
    mixed_precision: str = "no"
    channels_last: bool = False
    gradient_checkpointing: bool = False
    ema: float = 0.0
    seed: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 0
    validate_cases: int = 0
    log_every: int = 10
    workers: int = 0
    threads: int = 0
    out: str = "runs/mome"
    synonyms: float = 0.0
    tracker: str = "tensorboard"

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "gradient_accumulation", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} is at least 1, got {getattr(self, name)}")
        for name in (
            "steps",
            "checkpoint_every",
            "validate_every",
            "validate_cases",
            "log_every",
            "workers",
            "threads",
        ):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"train.{name} is at least 0, got {getattr(self, name)}")
        for name, top in (("warmup", 1), ("ema", 1), ("synonyms", 1), ("weight_decay", math.inf)):
            if not 0 <= getattr(self, name) <= top:
                raise InputError(f"train.{name} is from 0 to {top}, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise InputError(f"train.learning_rate is above 0, got {self.learning_rate}")
        for name, choices in (("mixed_precision", ("no", "bf16", "fp16")), ("tracker", ("tensorboard", "none"))):
            if getattr(self, name) not in choices:
                raise InputError(f"train.{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: a preset with overrides, its processor, its data and the loop.

    Args:
        init: Weights to start from (a folder, a bundled name or a Hub id); random where None.
        labels: What is trained.
        bank: Whose embeddings the checkpoint stores: `table` (every label of the class table, so that any of them
            can be prompted without the text tower) or `trained`.
    """

    preset: str = "mome_ct_tiny"
    init: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    bank: str = "table"
    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()
    cache: str = "cache"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: str | dict[str, Any] = "bce_dice"
    train: TrainConfig = field(default_factory=TrainConfig)


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides.

    `experts="swiglu(n=8)"` swaps a part of the model, `experts.n=8` one of its arguments, `train.steps=100` a
    setting of the loop. Values are read as YAML.

    Raises:
        InputError: No such file, not YAML, an unknown key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such training configuration", where=str(path))
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise InputError(f"the configuration is not valid YAML: {first}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise InputError("a training configuration is a mapping of keys to values", where=str(path))
    for override in overrides:
        _apply(raw, override)
    return _build(RunConfig, raw, "")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise InputError(f"an override is written key=value, got {override!r}", hint="train.steps=100")
    parts = key.strip().split(".")
    if parts[0] in MODEL_KEYS:
        parts = ["model", *parts]
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    node = raw
    for i, part in enumerate(parts[:-1]):
        child = node.get(part)
        if isinstance(child, str) and parts[0] == "model":  # a spec string: open it to change one argument
            from mome.spec import parse

            child = parse(child)
        elif child is None:
            child = {}
        elif not isinstance(child, dict):
            raise InputError(f"{'.'.join(parts[: i + 1])} is not a section", where=override)
        node[part] = child
        node = child
    node[parts[-1]] = value


def _build(cls: type, raw: Any, where: str) -> Any:
    """A frozen dataclass from plain data, with unknown keys and wrong types refused."""
    if not isinstance(raw, dict):
        raise InputError(f"{where or 'the configuration'} is a mapping of keys to values, got {raw!r}")
    hints, values = typing.get_type_hints(cls), {}
    for key, value in raw.items():
        name = f"{where}.{key}" if where else key
        if key not in hints:
            close = difflib.get_close_matches(str(key), list(hints), n=1)
            raise InputError(
                f"unknown key '{name}'" + (f", did you mean '{close[0]}'?" if close else ""),
                hint="keys: " + ", ".join(hints),
            )
        values[key] = _convert(hints[key], value, name)
    return cls(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None) and isinstance(value, typing.get_origin(option) or option):
                return value
        raise InputError(f"{name} cannot be {value!r}", hint=f"it is one of {hint}")
    if hint is Any or origin is dict or hint is dict:
        if (origin is dict or hint is dict) and not isinstance(value, dict):
            raise InputError(f"{name} is a mapping, got {value!r}")
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise InputError(f"{name} is of type {getattr(hint, '__name__', hint)}, got {value!r}")
