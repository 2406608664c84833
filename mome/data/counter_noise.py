"""Random fields that are equal on every device, because each voxel's number is computed from its index alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def normal_noise(keys: Sequence[tuple[int, int]], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Returns white noise (B, *shape), float32, of mean 0 and standard deviation 1.

    Uniform numbers are hashes of key and index; the Box-Muller transform makes normal ones of them. CPU and GPU differ
    by the rounding of a logarithm and a cosine.

    Args:
        keys: Two 32-bit numbers per sample.
        shape: Voxels.
        device: Where the noise is made.
    """
    count = math.prod(shape)
    half = -(-count // 2)
    index_V = torch.arange(2 * half, device=device, dtype=torch.int64)
    pairs = torch.tensor(keys, dtype=torch.int64).to(device)
    # Keys are hashed first: the indices under two keys of few bits would be a permutation of each other.
    first_B1, second_B1 = (_finished(_mixed(_mixed(key.clone()))) for key in pairs.split(1, dim=1))
    bits_BV = _mixed(index_V[None] ^ first_B1).add_(second_B1).bitwise_and_(_MASK)
    bits_BV = _finished(_mixed(_mixed(bits_BV)))
    uniform_BV = bits_BV.to(torch.float32).add_(0.5).div_(2**32)
    radius_BV = uniform_BV[:, :half].log().mul_(-2).clamp_(min=0).sqrt_()
    angle_BV = uniform_BV[:, half:].mul_(2 * math.pi)
    noise_BV = torch.cat([radius_BV * angle_BV.cos(), radius_BV * angle_BV.sin()], dim=1)
    return noise_BV[:, :count].reshape(len(keys), *shape)


def _mixed(x: Tensor) -> Tensor:
    """One round of the integer hash published by Thomas Mueller, in place, of 32-bit numbers in int64.

    Its multiplier has 27 bits, so that no product leaves int64.
    """
    return x.bitwise_xor_(x >> 16).mul_(0x45D9F3B).bitwise_and_(_MASK)


def _finished(x: Tensor) -> Tensor:
    """The last step of the hash, in place."""
    return x.bitwise_xor_(x >> 16)
