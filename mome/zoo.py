"""Presets by name: `create_model("mome_ct_base", experts="swiglu(n=8)")`, `list_models("mome*")`.

A preset is a plain dict: the model's parts as config strings, and the settings of its processor.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mome.errors import InputError

if TYPE_CHECKING:
    from mome.modeling import MoME
    from mome.processing import MoMEProcessor

BUNDLED = Path(__file__).parent / "checkpoints"
SIZES = Path(__file__).parent / "presets.json"

MINILM = (
    "hf(model='sentence-transformers/all-MiniLM-L6-v2', revision='1110a243fdf4706b3f48f1d95db1a4f5529b4d41', width=384)"
)
CLIP = "clip(model='openai/clip-vit-base-patch32', width=512)"
# With ReLU a structure that is rare in the patches can lose its head in training for good; see `DynamicHead`.
LEAKY_HEAD = "dynamic(negative_slope=0.1)"

# The tiny presets' grid is that of the head-and-neck scans they are trained on, about 4 × 4 × 2.5 mm.
_TINY_PROCESSOR = {"spacing": [3.90625, 3.90625, 2.5], "hu_window": [-250.0, 550.0]}
_TINY = {
    "encoder": "unet(channels=[16, 32, 64, 96, 128], depth=2, decoder_depth=1)",
    "text_encoder": MINILM,
    "dim": 16,
    "patch_size": [64, 64, 64],
}
# The ancestor's grid and window (Liu et al. 2023): 1.5 mm, −175…250 HU, 96³.
_BASE_PROCESSOR = {"spacing": [1.5, 1.5, 1.5], "hu_window": [-175.0, 250.0]}
_BASE = {
    "encoder": "swin_unetr(feature_size=48)",
    "text_encoder": CLIP,
    "dim": 48,
    "patch_size": [96, 96, 96],
    "labels": "ancestor_32",
}

PRESETS: dict[str, dict[str, Any]] = {
    "mome_ct_tiny": {
        "summary": "compact U-Net, sparse SwiGLU experts in every scale, text-guided fusion",
        "model": {
            **_TINY,
            "experts": "swiglu(n=4, hidden=24)",
            "router": "topk(k=1)",
            "fusion": "text_guided",
            "head": LEAKY_HEAD,
        },
        "processor": _TINY_PROCESSOR,
    },
    "universal_ct_tiny": {
        "summary": "the ancestor's reading (finest map, text-made head) on the compact U-Net",
        "model": {**_TINY, "experts": "linear", "fusion": "last"},
        "processor": _TINY_PROCESSOR,
    },
    "plain_ct_tiny": {
        "summary": "the compact U-Net with one output per label and no text",
        "model": {**_TINY, "text_encoder": "none", "experts": "linear", "fusion": "last", "head": "plain"},
        "processor": _TINY_PROCESSOR,
    },
    "mome_ct_base": {
        "summary": "Swin UNETR 48, CLIP ViT-B/32 bank, five scale experts, text-guided fusion, 32 classes",
        "model": {**_BASE, "experts": "linear", "fusion": "text_guided", "head": LEAKY_HEAD},
        "processor": _BASE_PROCESSOR,
    },
    "mome_ct_base_sparse": {
        "summary": "mome_ct_base with a sparse mixture of 8 SwiGLU experts inside every scale",
        "model": {
            **_BASE,
            "experts": "swiglu(n=8)",
            "router": "topk(k=2)",
            "fusion": "text_guided",
            "head": LEAKY_HEAD,
        },
        "processor": _BASE_PROCESSOR,
    },
    "universal_ct_base": {
        "summary": "the CLIP-Driven Universal Model's layout: Swin UNETR 48, finest map, text-made head",
        "model": {**_BASE, "experts": "linear", "fusion": "last"},
        "processor": _BASE_PROCESSOR,
    },
    "plain_ct_base": {
        "summary": "Swin UNETR 48 with one output per label and no text",
        "model": {**_BASE, "text_encoder": "none", "experts": "linear", "fusion": "last", "head": "plain"},
        "processor": _BASE_PROCESSOR,
    },
}


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names of the presets that match a wildcard; with `pretrained`, of the checkpoints that are bundled."""
    names = bundled_models() if pretrained else list(PRESETS)
    return [name for name in sorted(names) if fnmatch.fnmatch(name, pattern)]


def bundled_models() -> list[str]:
    """Names of the checkpoints inside the package, such as `mome-ct-tiny`."""
    if not BUNDLED.is_dir():
        return []
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "model.safetensors").is_file())


def preset(name: str) -> dict[str, Any]:
    """One preset.

    Raises:
        InputError: No preset of that name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name.replace("-", "_"), list(PRESETS), n=1)
        raise InputError(
            f"unknown preset '{name}'" + (f", did you mean '{close[0]}'?" if close else ""),
            hint="presets: " + ", ".join(PRESETS),
        )
    return PRESETS[name]


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> MoME:
    """A model from a preset, with any part or config value overridden.

    Args:
        name: Of the preset.
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
        checkpoint = name.replace("_", "-")
        if checkpoint not in bundled_models():
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
    """The processor that belongs to a preset, with any setting overridden."""
    from mome.processing import MoMEProcessor

    return MoMEProcessor(**{**preset(name)["processor"], **overrides})


def preset_sizes() -> dict[str, dict[str, Any]]:
    """Parameters of every preset, from the generated file (no torch needed)."""
    return json.loads(SIZES.read_text())


def measure_sizes() -> dict[str, dict[str, Any]]:
    """What `presets.json` holds, counted on the meta device."""
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
