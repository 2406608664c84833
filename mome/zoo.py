"""Builds and lists models by name: `create_model("mome_ct_base", experts="swiglu(n=8)")`, `list_models("mome*")`."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import TYPE_CHECKING, Any

from mome.errors import InputError
from mome.presets import PRESETS, SIZES, bundled_models, find_name, preset

if TYPE_CHECKING:
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Returns the names of presets that match a wildcard; with `pretrained`, the names of bundled checkpoints.

    In the pattern - and _ are the same, except inside brackets such as `[a-z]`.
    """
    names = bundled_models() if pretrained else list(PRESETS)
    plain = re.sub(r"\[[^\]]*\]|-", lambda found: "_" if found[0] == "-" else found[0], pattern)
    return [name for name in sorted(names) if fnmatch.fnmatch(name.replace("-", "_"), plain)]


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> MoME:
    """Builds a model from a preset; any part or config value can be overridden.

    Args:
        name: Name of the preset; - and _ are the same in it.
        pretrained: Load the bundled checkpoint of this preset instead of random weights.
        overrides: Config values, as in `experts="swiglu(n=8)"`, `labels=["liver"]`.

    Returns:
        The model, with its processor as `model.processor`.

    Raises:
        InputError: An unknown preset or value, or no bundled checkpoint of this name.
    """
    from mome.configuration import MoMEConfig
    from mome.labels import load_dataset
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor

    chosen = preset(name)
    if pretrained:
        checkpoint = find_name(name, bundled_models())
        if checkpoint is None:
            raise InputError(
                f"no checkpoint is bundled for preset '{name}'",
                hint="bundled: " + (", ".join(bundled_models()) or "none") + "; or load one from a folder or the Hub",
            )
        model = MoME.from_pretrained(checkpoint, **overrides)
        model.processor = MoMEProcessor.from_pretrained(checkpoint)
        return model
    values = {**chosen["model"], **overrides}
    labels = values.get("labels", "openkbp")
    if isinstance(labels, str):
        values["labels"] = list(load_dataset(labels).name_to_id)
    model = MoME(MoMEConfig(**values))
    model.processor = preset_processor(name)
    return model


def preset_processor(name: str, **overrides: Any) -> MoMEProcessor:
    """Builds the processor of a preset; any setting can be overridden."""
    from mome.processing import MoMEProcessor

    return MoMEProcessor(**{**preset(name)["processor"], **overrides})


def measure_sizes() -> dict[str, dict[str, Any]]:
    """Counts the parameters of every preset on the meta device: the contents of `preset_sizes.json`."""
    import torch

    sizes = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        sizes[name] = {
            "parameters": parameters,
            "encoder_parameters": sum(p.numel() for p in model.encoder.parameters()),
            "summary": PRESETS[name]["summary"],
            "parts": model.config.part_strings(),
        }
    return sizes


if __name__ == "__main__":
    SIZES.write_text(json.dumps(measure_sizes(), indent=2) + "\n")
