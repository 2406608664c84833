"""Numbers that depend on nothing but the place of a voxel in the volume, for routers that learn nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from mome.map_context import MapContext

# Products of two numbers of 31 bits stay within int64, so that no device and no compiler overflows.
_BITS = 0x7FFFFFFF


def scramble(value: Tensor) -> Tensor:
    """Mixes the bits of numbers of 31 bits, by the multiplications and shifts of a finaliser of hash functions."""
    value = (value ^ (value >> 16)) * 0x45D9F3B & _BITS
    value = (value ^ (value >> 15)) * 0x2C1B3C6D & _BITS
    return value ^ (value >> 16)


def place_hash(x_BDHWC: Tensor, context: MapContext, *, window: int, seed: int) -> Tensor:
    """A number from 0 to 2³¹ - 1 for every voxel of a map: (B, D, H, W) → (T,) int64.

    It is a function of ⌊p / window⌋ along D, H and W, and of the seed. p is the position of the voxel on the network
    grid: the patch's origin plus the index of the voxel times the stride of the map. So two tiles agree on the voxels
    that they share, and the voxels of a cube of `window` voxels of the network grid have one number.
    """
    batch, *sides, _ = x_BDHWC.shape
    device = x_BDHWC.device
    origin_B3 = torch.zeros(batch, 3, dtype=torch.int64, device=device)
    if context.origin_B3 is not None:
        origin_B3 = context.origin_B3.to(device=device, dtype=torch.int64)
    result = torch.full((batch, 1, 1, 1), seed & _BITS, dtype=torch.int64, device=device)
    for axis, (side, stride) in enumerate(zip(sides, context.stride, strict=True)):
        position_BN = origin_B3[:, axis, None] + torch.arange(side, device=device) * stride
        cell_BN = position_BN.div(window, rounding_mode="floor") & _BITS
        shape = [batch, 1, 1, 1]
        shape[axis + 1] = side
        result = scramble((scramble(result + axis + 1 & _BITS) ^ cell_BN.view(shape)) & _BITS)
    return result.flatten()
