"""Builds and lists models by name: `create_model("mome_ct_base", experts="swiglu(n=8)")`, `list_models("mome*")`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mome.errors import InputError
from mome.patterns import Patterns
from mome.presets import LICENCE, PRESETS, SIZES, find_name, preset
from mome.pretrained import PRETRAINED, default_tag, matching_models, pretrained_models, split_tag

if TYPE_CHECKING:
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor

logger = logging.getLogger(__name__)


def list_models(pattern: Patterns = "*", *, exclude: Patterns = (), pretrained: bool = False) -> list[str]:
    """Returns the sorted names of presets that match; with `pretrained`, those of weights with their tags.

    Args:
        pattern: One wildcard pattern or several. - and _ are the same, except inside brackets such as `[a-z]`.
        exclude: Patterns of names that are left out.
        pretrained: List weights, such as `mome_ct_tiny.openkbp`, instead of presets.

    Raises:
        InputError: A pattern is empty or opens a bracket that it does not close.
    """
    return matching_models(pretrained_models() if pretrained else PRESETS, pattern, exclude)


def create_model(name: str, *, pretrained: bool | None = None, **overrides: Any) -> MoME:
    """Builds a model from a preset; any part or config value can be overridden.

    Args:
        name: Name of the preset, or of its weights with their tag, such as `mome_ct_tiny.openkbp`; - and _ are the
            same in the name of the preset.
        pretrained: Load weights instead of random ones: those of the tag, or of the preset's default tag. None loads
            them where the name has a tag; unlike timm, which then gives random weights. False never loads them.
        overrides: Config values, as in `experts="swiglu(n=8)"`, `labels=["liver"]`. A text as `labels` stands for all
            structures of a data set: its name, or a YAML file of one's own.

    Returns:
        The model, with its processor as `model.processor`.

    Raises:
        InputError: An unknown preset, tag or value, no weights are there for this preset, or a part leaves a weight
            without values.
    """
    from mome.configuration import MoMEConfig
    from mome.labels.dataset_file import open_dataset
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor
    from mome.routers.base import Router
    from mome.uninitialised import refuse_uninitialised, uninitialised_as_nan

    name, tag = split_tag(name)
    chosen = preset(name)
    if pretrained or (pretrained is None and tag is not None):
        found = find_name(name, PRESETS)
        tag = tag or default_tag(str(found))
        if tag is None:
            raise InputError(
                f"no checkpoint is bundled for preset '{name}'",
                hint="bundled: "
                + (", ".join(pretrained_models()) or "none")
                + "; or load one from a folder or the Hub",
            )
        checkpoint = f"{found}.{tag}"
        model = MoME.from_pretrained(checkpoint, **overrides)
        model.processor = MoMEProcessor.from_pretrained(checkpoint)
        return model
    values = {**chosen["model"], **overrides}
    labels = values.get("labels", "openkbp")
    if isinstance(labels, str):
        values["labels"] = list(open_dataset(labels).annotated)
    elif isinstance(labels, list | tuple):  # the config refuses anything else
        _check_synonyms(labels)
    with uninitialised_as_nan():
        model = MoME(MoMEConfig(**values))
    refuse_uninitialised(model)
    if overrides.get("router") is not None and not any(isinstance(module, Router) for module in model.modules()):
        logger.warning("the router is not used: every layer of this model has one expert")
    model.processor = preset_processor(name)
    return model


def _check_synonyms(labels: Iterable[str]) -> None:
    """Checks that labels of the class table have its names; a model may have labels of its own beside them.

    Raises:
        InputError: A label is a synonym, a pair or a group of the class table, or has other capitals.
    """
    from mome.labels import load_table
    from mome.labels.unknown import unknown_label

    table = load_table()
    for name in labels:
        if isinstance(name, str) and name.strip() and name not in table and table.names_of(name):
            raise unknown_label(name)


def preset_processor(name: str, **overrides: Any) -> MoMEProcessor:
    """Builds the processor of a preset; any setting can be overridden."""
    from mome.processing import MoMEProcessor

    return MoMEProcessor(**{**preset(split_tag(name)[0])["processor"], **overrides})


def measure_sizes(names: Iterable[str] = PRESETS) -> dict[str, dict[str, Any]]:
    """Measures presets on the meta device: the contents of `preset_sizes.json`."""
    import torch

    from mome.model_cost import measure

    sizes = {}
    for name in names:
        with torch.device("meta"):
            model = create_model(name).eval()
        sizes[name] = {
            **measure(model)._asdict(),
            "patch_size": list(model.config.patch_size),
            "labels": len(model.config.labels),
            "licence": LICENCE,
            "weights": {tag: weights.place for tag, weights in PRETRAINED.get(name, {}).items()},
            "summary": PRESETS[name]["summary"],
            "parts": model.config.part_strings(),
        }
    return sizes


if __name__ == "__main__":
    SIZES.write_text(json.dumps(measure_sizes(), indent=2) + "\n")
