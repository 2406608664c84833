"""Rotary positions in three dimensions: attention between two tokens depends on their offset alone.

Rotary position embeddings are Su et al.'s (2021, arXiv 2104.09864); each axis has its own third of a
head's channels, as in the axial form of Heo et al. (2024, arXiv 2403.13298). The base of 100 is our choice for grids of
a few dozen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_angles(sides: Sequence[int], head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """The angles by which the channel pairs of each token are turned: (T, head_dim / 2), float32, in radians.

    Positions are counted in tokens from the centre of the grid. A token that is not turned, such as a register, thus
    stands at the centre.

    Args:
        sides: Tokens along D, H, W; T is their product, in that order.
        head_dim: Channels of an attention head, a multiple of six.
        base: Ratio of the largest wavelength to the smallest, nearly.
        device: Where the result lies.
    """
    pairs = head_dim // 6
    frequencies = base ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    axes = [torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2 for side in sides]
    positions_T3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    return (positions_T3[:, :, None] * frequencies).flatten(1)


def rotate(x_BHTD: Tensor, angles_TF: Tensor) -> Tensor:
    """Turns channel pairs (2i, 2i + 1) of each token by its angles, in float32; the type of the input is kept.

    Args:
        x_BHTD: Queries or keys: batch, heads, tokens, channels of a head.
        angles_TF: See `rotary_angles`.
    """
    even, odd = x_BHTD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles_TF.cos(), angles_TF.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BHTD.dtype)
