"""Tables of presets and of bundled checkpoints. Imports no torch.

A preset is a plain dict: the model's parts as config strings, and the settings of its processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mome.errors import InputError, did_you_mean

BUNDLED = Path(__file__).parent / "checkpoints"
SIZES = Path(__file__).parent / "preset_sizes.json"

MINILM = (
    "hf(model='sentence-transformers/all-MiniLM-L6-v2', revision='1110a243fdf4706b3f48f1d95db1a4f5529b4d41', width=384)"
)
CLIP = "clip(model='openai/clip-vit-base-patch32', width=512)"
# With ReLU the head of a structure that is rare in the patches can stop learning; see `DynamicHead`.
LEAKY_HEAD = "dynamic(negative_slope=0.1)"

# The grid of the head-and-neck scans that the tiny presets are trained on, about 4 × 4 × 2.5 mm.
_TINY_PROCESSOR = {"spacing": [3.90625, 3.90625, 2.5], "hu_window": [-250.0, 550.0]}
_TINY = {
    "encoder": "unet(channels=[16, 32, 64, 96, 128], depth=2, decoder_depth=1)",
    "text_encoder": MINILM,
    "dim": 16,
    "patch_size": [64, 64, 64],
}
# The grid and window of the CLIP-Driven Universal Model (Liu et al. 2023): 1.5 mm, −175…250 HU, 96³.
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
        "summary": "the CLIP-Driven Universal Model's parts (finest map, text-made head) on the compact U-Net",
        "model": {**_TINY, "experts": "linear", "fusion": "last"},
        "processor": _TINY_PROCESSOR,
    },
    "plain_ct_tiny": {
        "summary": "the compact U-Net with one output per label and no text",
        "model": {
            **_TINY,
            "text_encoder": "none",
            "experts": "linear",
            "fusion": "last",
            "head": "plain",
        },
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
        "model": {
            **_BASE,
            "text_encoder": "none",
            "experts": "linear",
            "fusion": "last",
            "head": "plain",
        },
        "processor": _BASE_PROCESSOR,
    },
}


def find_name(name: str, known: Iterable[str]) -> str | None:
    """Returns the one of the known names that `name` means, or None; in names of models - and _ are the same."""
    plain = name.replace("-", "_")
    return next((other for other in known if other.replace("-", "_") == plain), None)


def bundled_models() -> list[str]:
    """Returns the names of the checkpoints inside the package, such as `mome-ct-tiny`."""
    if not BUNDLED.is_dir():
        return []
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / "model.safetensors").is_file())


def preset(name: str) -> dict[str, Any]:
    """Returns one preset; its name may be written with - or _.

    Raises:
        InputError: No preset has that name.
    """
    found = find_name(name, PRESETS)
    if found is None:
        raise InputError(
            f"unknown preset '{name}'{did_you_mean(name.replace('-', '_'), PRESETS)}",
            hint="presets: " + ", ".join(PRESETS),
        )
    return PRESETS[found]


def preset_sizes() -> dict[str, dict[str, Any]]:
    """Returns the parameters of every preset from the generated file; no torch is needed."""
    return json.loads(SIZES.read_text())
