"""Sparse layers inside an encoder: in the place of a dense feed-forward layer, or after a stage of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.errors import InputError
from mome.layers.blocks import norm_layer
from mome.map_context import MapContext
from mome.registry import LAYERS
from mome.routers.base import Router
from mome.routers.routing import Routing

Stride = tuple[int, int, int]


def places(count: int, spec: dict[str, Any], owner: str) -> list[int]:
    """The blocks or stages that get a sparse layer: the n-th one and every n-th one after it.

    With `every=2` these are blocks 1, 3, 5, … counted from 0. GShard (Lepikhin et al. 2020, arXiv 2006.16668) replaces
    every other feed-forward layer too.

    Args:
        count: Number of blocks or stages.
        spec: The layer in its canonical form; a layer without the argument `every` stands in each place.
        owner: The encoder, for the message.

    Raises:
        InputError: There is no n-th place.
    """
    every = spec.get("every", 1)
    if not 1 <= every <= count:
        raise InputError(
            f"every={every} gives the layer '{spec['name']}' no place among the {count} places of {owner}",
            hint=f"every=1 to every={count}",
        )
    return list(range(every - 1, count, every))


def stages_with_layer(spec: dict[str, Any] | None, stages: Sequence[int], count: int, owner: str) -> list[int]:
    """The stages of a convolutional encoder that a sparse layer follows.

    Args:
        spec: The layer in its canonical form, or None.
        stages: The user's choice, 0 is the finest; empty for every n-th stage.
        count: Number of stages.
        owner: The encoder, for messages.

    Raises:
        InputError: A stage does not exist or stands twice, or stages are named without a layer.
    """
    if spec is None:
        if stages:
            raise InputError(
                f"layer_stages of {owner} has no layer to place",
                hint="layer=moe(experts=swiglu(n=8), router=topk(k=2))",
            )
        return []
    if not all(0 <= stage < count for stage in stages) or len(set(stages)) != len(stages):
        raise InputError(f"layer_stages of {owner} are different numbers from 0 to {count - 1}, got {list(stages)}")
    return sorted(stages) if stages else places(count, spec, owner)


def build_layer(spec: dict[str, Any], dim: int, owner: str) -> nn.Module:
    """Builds a layer that an encoder holds.

    Args:
        spec: The layer, as in `moe(experts=swiglu(n=8), router=topk(k=2))`.
        dim: Width of the tokens.
        owner: The encoder, for messages.

    Raises:
        InputError: The layer reads prompts: an encoder runs once for all of them.
    """
    try:
        layer = LAYERS.build(spec, dim=dim)
    except InputError as error:
        raise InputError(error.what, where=error.where or f"a layer inside {owner}", hint=error.hint) from error
    if getattr(layer, "reads_prompts", False):
        raise InputError(
            f"the layer '{spec['name']}' reads the prompt, but an encoder runs once for all prompts",
            where=f"a layer inside {owner}",
            hint="take experts and a router that read tokens or the map",
        )
    return layer


def check_maps(encoder: nn.Module, patch: Sequence[int]) -> None:
    """Checks that the routers inside an encoder can divide their maps of a patch.

    Args:
        encoder: The encoder.
        patch: The sides D, H, W of the patch, multiples of the encoder's strides.

    Raises:
        InputError: A router cannot.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, SparseReplacement | SparseResidual):
            router = getattr(module.layer, "router", None)
            depth, height, width = (side // step for side, step in zip(patch, module.stride, strict=True))
            if isinstance(router, Router):
                try:
                    router.check_map((depth, height, width))
                except InputError as error:
                    raise InputError(error.what, where=error.where or f"encoder.{name}", hint=error.hint) from error


class SparseReplacement(nn.Module):
    """A sparse layer in the place of a dense feed-forward layer. The residual belongs to the block around it.

    In a dense model of the same encoder the module of the same name is the dense layer; `mome.upcycling` relies on it.

    Args:
        spec: The layer.
        dim: Width of the tokens.
        stride: Voxels of the volume per token.
        owner: The encoder, for messages.
    """

    def __init__(self, spec: dict[str, Any], *, dim: int, stride: Stride, owner: str) -> None:
        super().__init__()
        self.layer, self.stride = build_layer(spec, dim, owner), stride


class SparseFeedForward(SparseReplacement):
    """The replacement in a block that hands on the place of the map, and collects routings."""

    def forward(self, x_BDHWC: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        """Map (B, D, H, W, C) → map of the same shape, and how its tokens were routed.

        Args:
            x_BDHWC: The normalised tokens.
            context: The place of the map, with its stride.
        """
        return self.layer(x_BDHWC, context)


class SparseResidual(nn.Module):
    """x + scale ⊙ layer(norm(x)) after a stage of a convolutional encoder (our choice).

    The scale of each channel starts at 0.1 (our choice, after the layer scale of Touvron et al. 2021, arXiv
    2103.17239), so that a new layer changes a trained network only a little.

    Args:
        spec: The layer.
        channels: Channels of the stage.
        stride: Voxels of the volume per voxel of the stage.
        norm: See `mome.layers.blocks.norm_layer`.
        owner: The encoder, for messages.
    """

    def __init__(self, spec: dict[str, Any], *, channels: int, stride: Stride, norm: str, owner: str) -> None:
        super().__init__()
        self.stride = stride
        self.norm = norm_layer(norm, channels)
        self.layer = build_layer(spec, channels, owner)
        self.scale_C = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x_BCDHW: Tensor, context: MapContext) -> tuple[Tensor, Routing | None]:
        """Map (B, C, D, H, W) → map of the same shape, and how its voxels were routed.

        Args:
            x_BCDHW: The result of the stage.
            context: The place of the map, with its stride.
        """
        y_BDHWC, routing = self.layer(self.norm(x_BCDHW).movedim(1, -1).contiguous(), context)
        return x_BCDHW + (self.scale_C * y_BDHWC).movedim(-1, 1).to(x_BCDHW.dtype), routing

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the scale."""
        init.constant_(self.scale_C, 0.1)
