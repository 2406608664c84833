"""Builds the parts of a model from its config, and checks that they fit each other and the patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from mome.configuration import MoMEConfig
from mome.encoders.base import Encoder
from mome.errors import InputError
from mome.layers.extra_scale import WholeModelScale
from mome.layers.heads.base import Head
from mome.layers.scale_expert import ScaleExpert
from mome.layers.sparse import check_maps
from mome.layers.text_bank import TextBank
from mome.model_size import check_tile
from mome.registry import ENCODERS, FUSIONS, HEADS, TEXT_ENCODERS
from mome.routers.fusion.base import Fusion


class Parts(NamedTuple):
    """The submodules of a model, and the first scale that has an expert."""

    encoder: Encoder
    scale_experts: nn.ModuleList
    fusion: Fusion
    head: Head
    text_bank: TextBank
    first_scale: int
    extra_experts: nn.ModuleList


def build_parts(config: MoMEConfig) -> Parts:
    """Builds the submodules of a model.

    Raises:
        InputError: A part, or a pair of parts, does not fit the config.
    """
    text_dim = config.text_dim
    assert text_dim is not None  # the config finds it where it is not given
    encoder: Encoder = ENCODERS.build(config.encoder, in_channels=config.in_channels)
    _check_patch(config, encoder)
    fusion_class, _ = FUSIONS.resolve(config.fusion)
    first_scale = len(encoder.channels) - 1 if fusion_class.finest_only else 0
    learned_width = getattr(TEXT_ENCODERS.build(config.text_encoder), "learned_width", 0)
    text_bank = TextBank(config.labels, text_dim, one_hot=config.has_one_hot_text, learned_width=learned_width)
    text_dim = text_bank.out_width
    scale_experts = nn.ModuleList(
        ScaleExpert(
            channels,
            dim=config.dim,
            head_channels=config.head_channels,
            text_dim=text_dim,
            experts=config.experts,
            router=config.router,
            residual=bool(config.residual),
        )
        for channels in encoder.channels[first_scale:]
    )
    _check_maps(config, encoder, scale_experts, first_scale)
    extra_experts = nn.ModuleList(
        WholeModelScale(
            reference,
            in_channels=config.in_channels,
            patch_size=config.patch_size,
            head_channels=config.head_channels,
            labels=config.labels,
        )
        for reference in config.extra_experts
    )
    if extra_experts:
        _check_takes_whole_models(config.fusion["name"], fusion_class)
    scales = len(scale_experts) + len(extra_experts)
    fusion = FUSIONS.build(config.fusion, channels=config.head_channels, text_dim=text_dim, scales=scales)
    head = HEADS.build(
        config.head,
        channels=config.head_channels,
        text_dim=text_dim,
        bottleneck_channels=encoder.bottleneck_channels,
    )
    return Parts(encoder, scale_experts, fusion, head, text_bank, first_scale, extra_experts)


def _check_takes_whole_models(name: str, fusion_class: Any) -> None:
    """Checks that a fusion weighs every scale, and can leave out one that a prompt does not have."""
    if fusion_class.finest_only:
        raise InputError(
            f"fusion '{name}' reads the finest scale alone, so that a whole-model expert would have no say",
            hint="fusion=text_guided",
        )
    if not fusion_class.takes_present and fusion_class.dot_product is Fusion.dot_product:
        raise InputError(
            f"fusion '{name}' cannot leave out an expert that has no class for a prompt",
            hint="fusion=text_guided, or forward(…, present_PS) and takes_present = True in its class",
        )


def _check_maps(config: MoMEConfig, encoder: Encoder, scale_experts: nn.ModuleList, first_scale: int) -> None:
    """Checks that the routers of the scales, and those inside the encoder, can divide their maps of a patch."""
    check_maps(encoder, config.patch_size)
    for expert, stride in zip(scale_experts, encoder.strides[first_scale:], strict=True):
        assert isinstance(expert, ScaleExpert)
        if expert.body.router is not None:
            depth, height, width = (side // step for side, step in zip(config.patch_size, stride, strict=True))
            expert.body.router.check_map((depth, height, width))


def sides(divisor: Sequence[int]) -> str:
    """The sides of a patch in words: one number where all are the same."""
    return str(divisor[0]) if len(set(divisor)) == 1 else str(tuple(divisor))


def _check_patch(config: MoMEConfig, encoder: Encoder) -> None:
    """Checks that the patch divides, fits into memory, and that instance norm sees two voxels at the bottleneck."""
    patch, divisor = list(config.patch_size), encoder.size_divisor
    steps = [max(1, math.ceil(side / step)) for side, step in zip(patch, divisor, strict=True)]
    fits = [count * step * (2 if max(steps) == 1 else 1) for count, step in zip(steps, divisor, strict=True)]
    name = config.encoder["name"]
    if any(side % step for side, step in zip(patch, divisor, strict=True)):
        raise InputError(
            f"patch_size {patch} does not fit encoder '{name}': its sides are multiples of {sides(divisor)}",
            hint=f"patch_size={fits}",
        )
    if max(steps) == 1:
        raise InputError(
            f"patch_size {patch} leaves encoder '{name}' one voxel at its bottleneck of stride {sides(divisor)}",
            hint=f"patch_size={fits}, or an encoder of fewer stages",
        )
    if encoder.max_sides is not None and any(a > b for a, b in zip(patch, encoder.max_sides, strict=True)):
        raise InputError(
            f"patch_size {patch} is larger than encoder '{name}' was built for, {list(encoder.max_sides)}",
            hint=f"patch_size={list(encoder.max_sides)}, or a larger img_size in the encoder's arguments",
        )
    check_tile(patch, encoder.strides[-1], encoder.channels[-1] + len(encoder.channels) * config.head_channels)
