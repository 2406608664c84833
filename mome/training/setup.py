"""Builds the model of a run and its processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mome.errors import InputError, did_you_mean
from mome.labels import load_table
from mome.labels.unknown import unknown_label
from mome.presets import preset
from mome.processing import MoMEProcessor
from mome.registry import PARTS, TEXT_ENCODERS
from mome.training.config import RunConfig
from mome.zoo import create_model, preset_processor

if TYPE_CHECKING:
    from mome.modeling import MoME


def build_model(run: RunConfig) -> tuple[MoME, MoMEProcessor]:
    """Returns the preset with the run's overrides, or the model of `run.init`, and the processor that goes with it.

    Random weights depend on `run.train.seed` alone. The text bank is filled by `TextRows`.

    Raises:
        InputError: An unknown preset, part or label, or no labels to train.
    """
    model, processor, _ = build_model_of_init(run)
    return model, processor


def build_model_of_init(run: RunConfig) -> tuple[MoME, MoMEProcessor, frozenset[str]]:
    """Returns what `build_model` does, and the labels that the weights of `run.init` were trained on.

    There are none with `text_rows: new`: the weights know the labels by the rows that are replaced.
    """
    base = preset(run.preset)["model"]
    _check_labels(run)
    torch.manual_seed(run.train.seed)
    trained = list(run.labels)
    _check_overrides(run)
    known = frozenset[str]()
    if run.init is None:
        labels = _bank_labels(run, run.model.get("text_encoder", base["text_encoder"]), stored=[])
        model = create_model(run.preset, labels=labels, trained_labels=trained, loss=run.loss, **run.model)
    else:
        from mome.modeling import MoME

        model = MoME.from_pretrained(run.init, loss=run.loss, **run.model)
        known = frozenset(model.config.trained_labels if run.text_rows == "kept" else ())
        model.relabel(_bank_labels(run, model.config.text_encoder, list(model.config.labels)), trained)
    words = {name: list(words) for name, words in run.own_structures.items() if words and name in run.labels}
    model.config.synonyms = {**(model.config.synonyms or {}), **words}
    model.processor = build_processor(run, None if run.init is None else model.loaded_processor)
    return model, model.processor, known


def build_processor(run: RunConfig, of_init: MoMEProcessor | None) -> MoMEProcessor:
    """Returns the processor of a run, with its overrides.

    Args:
        run: The run.
        of_init: The processor of `run.init`, whose weights know voxels and HU as it makes them; None for the preset's.
    """
    own = {} if of_init is None else of_init.settings()
    return preset_processor(run.preset, **{**own, **run.processor})


# The keys of a config that a run may replace. Labels and the number of the format are not among them.
_MODEL_KEYS = (
    *PARTS, "dim", "residual", "head_channels", "in_channels", "patch_size", "text_dim", "initializer_range",
    "extra_experts",
)  # fmt: skip
_PROCESSOR_KEYS = ("spacing", "orientation", "hu_window", "padding_hu", "overlap", "extend_mm")


def _check_overrides(run: RunConfig) -> None:
    """Checks the keys of `run.model` and `run.processor`, and that none is null.

    Raises:
        InputError: A key is unknown, or its value is null.
    """
    for section, given, known in (("model", run.model, _MODEL_KEYS), ("processor", run.processor, _PROCESSOR_KEYS)):
        for key, value in given.items():
            if key not in known:
                raise InputError(
                    f"the configuration has no argument '{section}.{key}'{did_you_mean(key, known)}",
                    hint="arguments: " + ", ".join(known),
                )
            if value is None:
                raise InputError(f"{section}.{key} is null", hint=f"leave out {key} to keep the preset's")


def _check_labels(run: RunConfig) -> None:
    """Checks that the labels are known and named once, and that the bank is one of its two choices."""
    if not run.labels:
        raise InputError("the configuration names no labels to train on", hint="labels: [liver, spleen]")
    table = load_table()
    for name in run.labels:
        if name not in table and name not in run.structures:
            own = (
                f"structures has {', '.join(map(str, run.structures))[:200]}"
                if run.structures
                else f"a structure of your own: structures: {{{name[:60]}: []}}"
            )
            raise unknown_label(name, f"mome list labels; {own}")
    twice = next((name for i, name in enumerate(run.labels) if name in run.labels[:i]), None)
    if twice is not None:
        raise InputError(f"the configuration names the label {twice!r} twice", hint="each label once in labels: […]")
    if run.bank not in ("table", "trained"):
        raise InputError(f"bank is 'table' or 'trained', got {run.bank!r}")


def _bank_labels(run: RunConfig, text_encoder: str | dict[str, Any], stored: list[str]) -> list[str]:
    """Returns the labels of the text bank: the trained ones first, then the others.

    With `bank: table`, the others are the labels that the bank `stored` before and, if the text encoder has a tower to
    embed them, the whole class table; of a new model, the labels of the text encoder's file.
    """
    if run.bank == "trained":
        return list(run.labels)
    encoder = TEXT_ENCODERS.build(text_encoder)
    # Free text that was added to a model is no label of the table.
    others = [*load_table().names(), *stored] if encoder.needs_tower else stored or encoder.stored_labels()
    return list(dict.fromkeys([*run.labels, *others]))
