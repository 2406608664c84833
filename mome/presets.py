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

# The licence of the code of every preset; packages that an encoder imports have their own.
LICENCE = "Apache-2.0"

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

# A Swin UNETR of half the width for small GPUs, and one of double the width; our choice.
_SMALL = {**_BASE, "encoder": "swin_unetr(feature_size=24)", "dim": 24}
_LARGE = {**_BASE, "encoder": "swin_unetr(feature_size=96)", "dim": 96}
_NETWORKS = {
    "tiny": (_TINY, _TINY_PROCESSOR, "the compact U-Net"),
    "small": (_SMALL, _BASE_PROCESSOR, "Swin UNETR 24"),
    "base": (_BASE, _BASE_PROCESSOR, "Swin UNETR 48"),
    "large": (_LARGE, _BASE_PROCESSOR, "Swin UNETR 96"),
}
_SPARSE = {"experts": "swiglu(n=8)", "router": "topk(k=2)"}
_TEXT_GUIDED = {"fusion": "text_guided", "head": LEAKY_HEAD}


def _mome(size: str, summary: str, **parts: str) -> dict[str, Any]:
    model, processor, _ = _NETWORKS[size]
    experts = {"experts": "linear", **parts}
    return {"summary": summary, "model": {**model, **experts, **_TEXT_GUIDED}, "processor": processor}


def _mome_sparse(size: str) -> dict[str, Any]:
    """The rule of every `…_sparse`: eight SwiGLU experts in every scale, of which a voxel takes two."""
    return _mome(size, f"mome_ct_{size} with a sparse mixture of 8 SwiGLU experts inside every scale", **_SPARSE)


def _universal(size: str) -> dict[str, Any]:
    model, processor, network = _NETWORKS[size]
    return {
        "summary": f"the CLIP-Driven Universal Model's parts (finest map, text-made head) on {network}",
        "model": {**model, "experts": "linear", "fusion": "last"},
        "processor": processor,
    }


def _plain(size: str) -> dict[str, Any]:
    model, processor, network = _NETWORKS[size]
    parts = {"text_encoder": "none", "experts": "linear", "fusion": "last", "head": "plain"}
    return {
        "summary": f"{network} with one output per label and no text",
        "model": {**model, **parts},
        "processor": processor,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # The bundled weights belong to this one: it has sparse experts though its name does not say so.
    "mome_ct_tiny": _mome(
        "tiny",
        "compact U-Net, sparse SwiGLU experts in every scale, text-guided fusion",
        experts="swiglu(n=4, hidden=24)",
        router="topk(k=1)",
    ),
    "mome_ct_small": _mome("small", "Swin UNETR 24, five scale experts, text-guided fusion, 32 classes"),
    "mome_ct_base": _mome(
        "base", "Swin UNETR 48, CLIP ViT-B/32 bank, five scale experts, text-guided fusion, 32 classes"
    ),
    "mome_ct_large": _mome("large", "Swin UNETR 96, five scale experts, text-guided fusion, 32 classes"),
    **{f"mome_ct_{size}_sparse": _mome_sparse(size) for size in _NETWORKS},
    **{f"universal_ct_{size}": _universal(size) for size in _NETWORKS},
    **{f"plain_ct_{size}": _plain(size) for size in _NETWORKS},
}
for _name, _summary, _encoder in (
    (
        "mome_ct_timm_convnext",
        "timm's ConvNeXt-T over slices and a 3D decoder, 8 sparse SwiGLU experts in every scale",
        "timm(model='convnext_tiny')",
    ),
    (
        "mome_ct_resenc_m",
        "nnU-Net's residual encoder U-Net M, 8 sparse SwiGLU experts in every scale",
        "resenc_unet(preset='M')",
    ),
    (
        "mome_ct_vit3d_small",
        "3D vision transformer over 8³-voxel tokens, 8 sparse SwiGLU experts in every scale",
        "vit3d",
    ),
):
    PRESETS[_name] = {
        "summary": _summary,
        "model": {**_BASE, "encoder": _encoder, "dim": 32, **_SPARSE, **_TEXT_GUIDED},
        "processor": _BASE_PROCESSOR,
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
    """Returns the sizes, parts and licence of every preset from the generated file; no torch is needed."""
    return json.loads(SIZES.read_text())
