"""Checks the shapes of what a model is called with, before a layer deep inside fails on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from mome.errors import InputError
from mome.parts import sides


def check_volume(volume: Any, channels: int, divisor: Sequence[int]) -> None:
    """Checks a volume (B, C, D, H, W).

    Args:
        volume: What was given.
        channels: C, the channels of the model's input.
        divisor: The number that each of D, H and W is a multiple of.

    Raises:
        InputError: It is no tensor of floating-point numbers, has another number of dimensions or channels, holds no
            volume, or a side does not fit.
    """
    if not isinstance(volume, Tensor) or not volume.is_floating_point():
        given = f"a tensor of {volume.dtype}" if isinstance(volume, Tensor) else f"{type(volume).__name__}"
        raise InputError(
            f"the volume is a tensor of floating-point numbers (B, {channels}, D, H, W), got {given}",
            hint="MoMEProcessor.to_network makes it from a scan in HU; mome.segment takes the scan itself",
        )
    if volume.dim() != 5 or volume.shape[1] != channels:
        raise InputError(
            f"the volume is (B, {channels}, D, H, W), got {tuple(volume.shape)}",
            hint="volume[None, None] adds the axes of batch and channel to (D, H, W)",
        )
    if volume.shape[0] == 0:
        raise InputError(f"the batch holds no volume, got {tuple(volume.shape)}", hint="leave an empty batch out")
    if any(side % step or side == 0 for side, step in zip(volume.shape[2:], divisor, strict=True)):
        raise InputError(
            f"the volume's sides {tuple(volume.shape[2:])} are not multiples of {sides(divisor)}",
            hint="pad it, or let mome.inference.segment do so",
        )


def check_bottleneck(volume: Tensor, stride: Sequence[int], networks: Iterable[nn.Module]) -> None:
    """Checks that instance norms see more than one voxel of the coarsest map.

    Args:
        volume: The volume (B, C, D, H, W).
        stride: Voxels of the volume per voxel of the coarsest map, along each side.
        networks: The modules that see this map.

    Raises:
        InputError: The coarsest map has one voxel, and an instance norm would make it 0.
    """
    if math.prod(-(-side // step) for side, step in zip(volume.shape[2:], stride, strict=True)) > 1:
        return
    if any(isinstance(module, nn.InstanceNorm3d) for network in networks for module in network.modules()):
        raise InputError(
            f"a volume of {sides(volume.shape[2:])} voxels has one voxel in the coarsest map, and its norm needs two",
            hint=f"make a side at least twice as long as {sides(stride)}; the config's patch_size is large enough",
        )


def check_text(text: Any, width: int, extra_experts: int = 0) -> None:
    """Checks text rows (P, T).

    Args:
        text: What was given.
        width: T, the width that the model was built for.
        extra_experts: The number of whole-model experts, each of which has a column of class numbers behind the row.

    Raises:
        InputError: It is no tensor, or has another shape.
    """
    if not isinstance(text, Tensor):
        raise InputError(
            f"text_PT is a tensor of text rows (P, {width}), got {type(text).__name__}",
            hint="model.text_bank.rows([names]) for known labels, mome.prompts.embed_prompts for others",
        )
    if extra_experts and (text.dim() != 2 or text.shape[1] != width + extra_experts or text.shape[0] == 0):
        raise InputError(
            f"text_PT is (P, {width} + {extra_experts}), a text row and a class number of each whole-model expert, "
            f"got {tuple(text.shape)}",
            hint="model.prompt_rows(text rows, names of the prompts) makes them",
        )
    if not extra_experts and (text.dim() != 2 or text.shape[1] != width or text.shape[0] == 0):
        raise InputError(
            f"text_PT is (P, {width}), one row per prompt, got {tuple(text.shape)}",
            hint="rows come from the text encoder that the model was trained with",
        )


def check_targets(volume: Tensor, prompts: int, targets: Any, supervised: Any) -> None:
    """Checks targets (B, P, D, H, W) and what is annotated (B, P).

    Args:
        volume: The volume (B, C, D, H, W).
        prompts: P.
        targets: What was given.
        supervised: What was given, or None.

    Raises:
        InputError: One of them has another shape, or is no tensor.
    """
    wanted = {"targets": (volume.shape[0], prompts, *volume.shape[2:]), "supervised_BP": (volume.shape[0], prompts)}
    for (name, shape), given in zip(wanted.items(), (targets, supervised), strict=True):
        if name == "supervised_BP" and given is None:
            continue
        if not isinstance(given, Tensor) or tuple(given.shape) != shape:
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            axes = "(B, P, D, H, W)" if name == "targets" else "(B, P)"
            raise InputError(f"{name} is {axes} = {shape}, got {found}", hint="P is the number of rows of text_PT")


def check_pyramid(pyramid: Any, encoder: nn.Module, volume: tuple[int, ...]) -> None:
    """Checks that an encoder's maps have the channels and strides that it declares; encoders may be a user's own.

    Args:
        pyramid: What the encoder returned.
        encoder: The encoder.
        volume: The sides D, H, W of the volume.

    Raises:
        InputError: It is no pyramid, or a map has another shape.
    """
    name, encoder_of = type(encoder).__name__, cast("Any", encoder)
    maps = getattr(pyramid, "maps", None)
    channels, strides = encoder_of.channels, encoder_of.strides
    if maps is None or not hasattr(pyramid, "bottleneck") or len(maps) != len(channels):
        got = type(pyramid).__name__ if maps is None else f"{len(maps)} maps"
        raise InputError(
            f"encoder {name} returns a Pyramid of {len(channels)} maps and a bottleneck, got {got}",
            hint="see mome/encoders/base.py",
        )
    for number, (map_BCDHW, width, stride) in enumerate(zip(maps, channels, strides, strict=True)):
        expected = (width, *(side // step for side, step in zip(volume, stride, strict=True)))
        if tuple(map_BCDHW.shape[1:]) != expected:
            raise InputError(
                f"map {number} of encoder {name} is {tuple(map_BCDHW.shape)}; by its channels and strides, coarse to "
                f"fine, it is (B, {', '.join(map(str, expected))})",
                hint="see mome/encoders/base.py",
            )


def check_scalar(loss: Any, loss_function: nn.Module) -> None:
    """Checks that a loss is one number; losses may be a user's own.

    Raises:
        InputError: It is not.
    """
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"loss {type(loss_function).__name__} returns one number, a tensor without dimensions, got {got}",
            hint="the mean over the annotated structures, as in mome/losses/masked.py",
        )
