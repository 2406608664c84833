"""The CLIP-Driven Universal Model (Liu et al. 2023, arXiv 2301.00785): encoder, head and text rows, exactly.

Its parts are `swin_unetr` or `genesis_unet`, the finest map alone (`fusion="last"`), one linear layer before the head,
and `dynamic`. The published layer before the head goes from the map to 8 channels; ours has three linear layers there,
of which the second and third become identities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mome.convert.mapping import Conversion, another_architecture, match_encoder
from mome.convert.swin_unetr import PROCESSOR, swin_spec
from mome.labels import load_dataset
from mome.presets import CLIP

_WHAT = "CLIP-Driven Universal Model"
_CHANNELS = 8
# Entries of the controller's result: the weights of the three layers stand before all of their biases.
_SIZES = {"w1": _CHANNELS**2, "w2": _CHANNELS**2, "w3": _CHANNELS, "b1": _CHANNELS, "b2": _CHANNELS, "b3": 1}
_OUR_ORDER = ("w1", "b1", "w2", "b2", "w3", "b3")
# The U-Net's layers by their published names; the pairs of convolutions are called ops.0 and ops.1.
_DOWN = ("down_tr64", "down_tr128", "down_tr256", "down_tr512")
_UP = ("up_tr256", "up_tr128", "up_tr64")


def universal_model(source: Mapping[str, Tensor], norm: str | None = None) -> Conversion:
    """A checkpoint of the Universal Model with word embeddings, of the backbone `swinunetr` or `unet`.

    Raises:
        InputError: A tensor is missing or has another shape, as in a checkpoint without word embeddings.
    """
    if "down_tr64.ops.0.conv1.weight" in source:
        width = int(source["down_tr64.ops.0.conv1.weight"].shape[0])
        spec = {"name": "genesis_unet", "width": width}
        renamed = _unet_names(source)
        renamed_tensors = {name: source[key] for name, key in renamed.items()}
        tensors, used_names = match_encoder(
            spec, renamed_tensors, required=("down.", "up.", "fuse."), what=_WHAT, prefix=""
        )
        used = {renamed[name] for name in used_names}
        notes = [
            "biases before a normalisation have no effect, and running statistics were never used: both are left out"
        ]
    else:
        spec = swin_spec(source, _WHAT)
        tensors, used = match_encoder(spec, source, required=("swinViT.", "encoder", "decoder"), what=_WHAT)
        notes = []
    head, head_used = _head(source)
    labels = list(load_dataset("ancestor_32").name_to_id)
    if source["organ_embedding"].shape[0] != len(labels):
        raise another_architecture(_WHAT, "organ_embedding", (len(labels), 512), source)
    width = head["head.text.weight"].shape[0]
    return Conversion(
        config={
            "encoder": spec,
            "text_encoder": CLIP,
            "text_dim": source["organ_embedding"].shape[1],
            "experts": "linear",
            "fusion": "last",
            "head": f"dynamic(hidden={width})",
            "dim": _CHANNELS,
            "head_channels": _CHANNELS,
            "labels": labels,
        },
        tensors={**tensors, **head},
        used=used | head_used,
        processor=dict(PROCESSOR),
        trained_labels=labels,
        notes=notes,
        fixed=True,
    )


def _unet_names(source: Mapping[str, Tensor]) -> dict[str, str]:
    """Our names of the U-Net's tensors → the file's."""
    names = {}
    for ours, theirs in (("down", _DOWN), ("fuse", _UP)):
        for index, stage in enumerate(theirs):
            for op in range(2):  # convolution, normalisation, activation
                names[f"{ours}.{index}.{3 * op}.weight"] = f"{stage}.ops.{op}.conv1.weight"
                names[f"{ours}.{index}.{3 * op + 1}.weight"] = f"{stage}.ops.{op}.bn1.weight"
                names[f"{ours}.{index}.{3 * op + 1}.bias"] = f"{stage}.ops.{op}.bn1.bias"
    for index, stage in enumerate(_UP):
        for kind in ("weight", "bias"):
            names[f"up.{index}.{kind}"] = f"{stage}.up_conv.{kind}"
    for key in names.values():
        if key not in source:
            raise another_architecture(_WHAT, key, None, source)
    return names


def _head(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors after the backbone, by our names, and those that are used of the file."""
    keys = [f"{layer}.{kind}" for layer in ("precls_conv.0", "precls_conv.2", "GAP.0", "GAP.3") for kind in _KINDS]
    keys += [f"{layer}.{kind}" for layer in ("controller", "text_to_vision") for kind in _KINDS]
    for key in (*keys, "organ_embedding"):
        if key not in source:
            raise another_architecture(_WHAT, key, None, source)
    order = _controller_rows()
    controller = source["controller.weight"].flatten(1)
    if controller.shape[0] != len(order):
        raise another_architecture(_WHAT, "controller.weight", (len(order), controller.shape[1], 1, 1, 1), source)
    expert = "scale_experts.0."
    identity = torch.eye(_CHANNELS)
    return {
        f"{expert}norm.weight": source["precls_conv.0.weight"],
        f"{expert}norm.bias": source["precls_conv.0.bias"],
        f"{expert}proj_in.weight": source["precls_conv.2.weight"].flatten(1),
        f"{expert}proj_in.bias": source["precls_conv.2.bias"],
        f"{expert}body.experts.weight_EDD": identity[None],
        f"{expert}body.experts.bias_ED": torch.zeros(1, _CHANNELS),
        f"{expert}proj_out.weight": identity,
        f"{expert}proj_out.bias": torch.zeros(_CHANNELS),
        "head.image_norm.weight": source["GAP.0.weight"],
        "head.image_norm.bias": source["GAP.0.bias"],
        "head.image.weight": source["GAP.3.weight"].flatten(1),
        "head.image.bias": source["GAP.3.bias"],
        "head.text.weight": source["text_to_vision.weight"],
        "head.text.bias": source["text_to_vision.bias"],
        "head.controller.weight": controller[order],
        "head.controller.bias": source["controller.bias"][order],
        "text_bank.rows_LT": source["organ_embedding"],
        "text_bank.mean_T": torch.zeros(source["organ_embedding"].shape[1]),
        "text_bank.scale": torch.ones(()),
    }, {*keys, "organ_embedding"}


_KINDS = ("weight", "bias")


def _controller_rows() -> Tensor:
    """The rows of the published controller in the order of `DynamicHead.sizes`."""
    first, starts = 0, {}
    for name, size in _SIZES.items():
        starts[name] = first
        first += size
    return torch.cat([torch.arange(starts[name], starts[name] + _SIZES[name]) for name in _OUR_ORDER])
