"""Self-attention over the tokens of a volume, with rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mome.layers.rotary import rotate


class RotaryAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); queries and keys are turned by their positions.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; dim / heads is a multiple of six.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_BTC: Tensor, angles_TF: Tensor) -> Tensor:
        """Tokens (B, R + T, C) → (B, R + T, C).

        Args:
            x_BTC: R register tokens, which have no position, and then the T tokens of the volume.
            angles_TF: Angles of the T tokens.
        """
        registers = x_BTC.shape[1] - angles_TF.shape[0]
        q, k, v = self.qkv(x_BTC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, R + T, D) each
        q, k = (torch.cat([x[:, :, :registers], rotate(x[:, :, registers:], angles_TF)], dim=2) for x in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
