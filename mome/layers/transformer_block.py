"""A pre-norm transformer block over the tokens of a volume; its feed-forward layer is dense or sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mome.layers.attention import RotaryAttention
from mome.layers.feed_forward import FeedForward
from mome.layers.sparse import SparseFeedForward
from mome.map_context import MapContext
from mome.routers.routing import Routing


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    In a sparse block the register tokens, which have no place in the map, take a dense layer of their own; in the last
    block they take none, since nothing reads them after it.

    Args:
        dim: Width of the tokens.
        heads: Attention heads.
        feed_forward: Form of the dense layer, see `mome.layers.feed_forward`.
        hidden: Width of its hidden layer.
        sparse: The sparse layer that replaces the dense one, or None.
        stride: Voxels of the volume per token.
        registers: Number of register tokens.
        is_last: Whether no block follows.
        owner: The encoder, for messages.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        feed_forward: str,
        hidden: int,
        sparse: dict[str, Any] | None,
        stride: tuple[int, int, int],
        registers: int,
        is_last: bool,
        owner: str,
    ) -> None:
        super().__init__()
        self.registers = registers
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = RotaryAttention(dim, heads)
        self.feed_forward = (
            FeedForward(feed_forward, dim, hidden)
            if sparse is None
            else SparseFeedForward(sparse, dim=dim, stride=stride, owner=owner)
        )
        has_own_layer = sparse is not None and registers > 0 and not is_last
        self.register_feed_forward = FeedForward(feed_forward, dim, hidden) if has_own_layer else None

    def forward(
        self, x_BTC: Tensor, sides: tuple[int, int, int], angles_TF: Tensor, context: MapContext
    ) -> tuple[Tensor, Routing | None]:
        """Tokens (B, R + D·H·W, C) → tokens of the same shape, and how they were routed.

        Args:
            x_BTC: The register tokens, then the tokens of the volume.
            sides: Tokens of the volume along D, H, W.
            angles_TF: See `mome.layers.rotary`.
            context: The place of the volume, with the stride of the tokens.
        """
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC), angles_TF)
        normed_BTC = self.norm_2(x_BTC)
        if isinstance(self.feed_forward, FeedForward):
            return x_BTC + self.feed_forward(normed_BTC), None
        registers = x_BTC[:, : self.registers]
        if self.register_feed_forward is not None:
            registers = registers + self.register_feed_forward(normed_BTC[:, : self.registers])
        map_BDHWC = normed_BTC[:, self.registers :].unflatten(1, sides)
        y_BDHWC, routing = self.feed_forward(map_BDHWC, context)
        return torch.cat([registers, x_BTC[:, self.registers :] + y_BDHWC.flatten(1, 3)], dim=1), routing
