"""Volumes whose sides a network cannot divide: padded before it, and its maps cropped after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from mome.encoders.base import Pyramid, Stride


def on_padded(
    run: Callable[[Tensor], Pyramid], x_BCDHW: Tensor, *, divisor: Stride, strides: Sequence[Stride]
) -> Pyramid:
    """Runs a network on a volume whose sides are multiples of `divisor`, and crops the maps to the volume given.

    Zeros are added behind the last voxel of each axis; zero is the value of air after windowing. The bottleneck is not
    cropped.

    Args:
        run: Padded volume (B, C, D, H, W) → pyramid.
        x_BCDHW: A volume with sides of any length.
        divisor: The sides (D, H, W) that the network needs are multiples of these.
        strides: The strides of the maps, coarse to fine.

    Returns:
        The pyramid. A map of stride s has ⌈side / s⌉ voxels along each axis.
    """
    sides = x_BCDHW.shape[2:]
    return cropped(run(pad(x_BCDHW, [-side % step for side, step in zip(sides, divisor, strict=True)])), sides, strides)


def pad(x_BCDHW: Tensor, added: Sequence[int]) -> Tensor:
    """Adds `added` (D, H, W) zeros behind the last voxel of each axis."""
    if not any(added):
        return x_BCDHW
    depth, height, width = added
    return F.pad(x_BCDHW, (0, width, 0, height, 0, depth))


def cropped(pyramid: Pyramid, sides: Sequence[int], strides: Sequence[Stride]) -> Pyramid:
    """Crops maps to ⌈side / stride⌉ voxels along each axis of a volume with sides (D, H, W)."""
    maps = []
    for map_BCDHW, stride in zip(pyramid.maps, strides, strict=True):
        d, h, w = (math.ceil(side / step) for side, step in zip(sides, stride, strict=True))
        maps.append(map_BCDHW if map_BCDHW.shape[2:] == (d, h, w) else map_BCDHW[:, :, :d, :h, :w])
    return pyramid._replace(maps=tuple(maps))
