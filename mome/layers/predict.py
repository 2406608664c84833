"""From the feature maps of the scales to logits: the one place that decides between the fused op and plain torch."""

from __future__ import annotations

import torch
from mome_kernels import fusion_head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mome.layers.heads.base import Head
from mome.routers.fusion.base import Fusion, mix_by_dot_product, without_absent
from mome.routers.fusion.static import LastFusion

# Elements of the mixture (B, P, C, V) of one tile of voxels; 64 MB in float32.
_TILE_ELEMENTS = 2**24


@torch.compiler.assume_constant_result  # `predict` calls this while it is traced
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def predict(
    fusion: Fusion,
    head: Head,
    features_BSCV: Tensor,
    text_PT: Tensor,
    bottleneck: Tensor,
    present_PS: Tensor | None = None,
) -> Tensor:
    """Fuses the scales and applies the head: logits (B, P, V).

    Where the fusion is a dot product and the head has three layers, one op computes both. Any other pair runs the
    plain forward of its parts, a tile of voxels at a time, so that no (P × C × voxels) is stored. Under autocast the
    logits are float32 in both cases.

    Args:
        fusion, head: Parts of the model.
        features_BSCV: The maps of all scales at the finest resolution.
        text_PT: Text rows of the prompts.
        bottleneck: The encoder's deepest map.
        present_PS: bool, the scales that each prompt has; None where it has all.
    """
    dot_product = fusion.dot_product(text_PT)
    layers = head.layers(text_PT, bottleneck) if dot_product is not None else None
    if dot_product is not None and layers is not None:
        query_PC, bias_PS, top_k = without_absent(dot_product, present_PS)
        slope = layers.negative_slope
        return fusion_head(features_BSCV, query_PC, bias_PS, *layers[:6], top_k=top_k, negative_slope=slope)
    logits_BPV = predict_in_tiles(fusion, head, features_BSCV, text_PT, bottleneck, present_PS)
    kind = features_BSCV.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        logits_BPV = logits_BPV.to(torch.promote_types(logits_BPV.dtype, torch.float32))
    return logits_BPV


def predict_one_scale(head: Head, features_BCV: Tensor, text_PT: Tensor, bottleneck: Tensor) -> Tensor:
    """Applies the head to the map of one scale, without a fusion: logits (B, P, V)."""
    alone = LastFusion(LastFusion.Config(), channels=features_BCV.shape[1], text_dim=text_PT.shape[1], scales=1)
    return predict(alone, head, features_BCV[:, None], text_PT, bottleneck)


def predict_in_tiles(
    fusion: Fusion,
    head: Head,
    features_BSCV: Tensor,
    text_PT: Tensor,
    bottleneck: Tensor,
    present_PS: Tensor | None = None,
) -> Tensor:
    """The plain forward of fusion and head over tiles of voxels; in training each tile is recomputed in backward.

    What a fusion reads of the whole map (`Fusion.summarise`) is computed before the split.
    """
    known = {"summary": fusion.summarise(features_BSCV), "present_PS": present_PS}
    known = {name: value for name, value in known.items() if value is not None}

    def fuse(features: Tensor, text: Tensor) -> Tensor:
        if present_PS is not None and not fusion.takes_present:
            numbers = fusion.dot_product(text)
            assert numbers is not None  # parts.py builds no other fusion beside whole-model experts
            return mix_by_dot_product(features, without_absent(numbers, present_PS))
        return fusion(features, text, **known)

    def one_tile(features: Tensor, text: Tensor, deepest: Tensor) -> Tensor:
        return head(fuse(features, text), text, deepest)

    batch, _, channels, voxels = features_BSCV.shape
    tile_voxels = max(1, _TILE_ELEMENTS // (batch * text_PT.shape[0] * channels))
    if voxels <= tile_voxels:
        return one_tile(features_BSCV, text_PT, bottleneck)
    tiles = []
    for tile in features_BSCV.split(tile_voxels, dim=-1):
        if torch.is_grad_enabled():
            tiles.append(checkpoint(one_tile, tile, text_PT, bottleneck, use_reentrant=False))
        else:
            tiles.append(one_tile(tile, text_PT, bottleneck))
    return torch.cat(tiles, dim=-1)
