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
    # The key is hashed, too: the indices under two keys of few bits would be a permutation of each other.
    hashed_BV = _hashed((_hashed(index_V[None] ^ _hashed(pairs[:, :1])) + pairs[:, 1:]) & _MASK)
    uniform_BV = (hashed_BV.to(torch.float32) + 0.5) / 2**32
    radius_BV = (-2 * uniform_BV[:, :half].log()).clamp(min=0).sqrt()
    angle_BV = 2 * math.pi * uniform_BV[:, half:]
    noise_BV = torch.cat([radius_BV * angle_BV.cos(), radius_BV * angle_BV.sin()], dim=1)
    return noise_BV[:, :count].reshape(len(keys), *shape)


def _hashed(x: Tensor) -> Tensor:
    """Mixes the bits of 32-bit numbers in int64 (the integer hash published by Thomas Mueller).

    Its multiplier has 27 bits, so that no product leaves int64.
    """
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _MASK
    return (x >> 16) ^ x
