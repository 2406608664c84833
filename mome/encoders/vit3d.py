"""A vision transformer over blocks of voxels, with rotary positions and a decoder of transposed convolutions.

It follows the design of Primus (Wald et al. 2025, arXiv 2503.01835): small tokens of 8³ voxels, rotary positions in
three dimensions, and a decoder so light that the transformer does the work. The sizes are our choice; weights of Primus
do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, Stride
from mome.encoders.padding import on_padded
from mome.errors import InputError
from mome.layers.rotary import rotary_angles
from mome.layers.sparse import places
from mome.layers.transformer_block import TransformerBlock
from mome.layers.upsampling import UpsamplingDecoder
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least, part
from mome.routers.routing import Routing


class ViT3D(Encoder):
    """Transformer over tokens of `patch` voxels; the map of tokens is the bottleneck.

    It follows Primus (arXiv 2503.01835); the sizes are our choice.

    The decoder doubles the resolution until the finest map has that of the volume. Nothing depends on where the volume
    lies, and any number of tokens along an axis is allowed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `vit3d`.

        Args:
            width: Channels of a token.
            depth: Transformer blocks.
            heads: Attention heads; width / heads is a multiple of six, two channels for each axis and frequency.
            patch: Voxels (D, H, W) of a token, powers of two; they may differ between axes.
            registers: Tokens without a place that take part in attention (Darcet et al. 2023, arXiv 2309.16588).
            mlp: Form of the dense feed-forward layers: `mlp`, `swiglu` or `geglu`.
            hidden: Width of their hidden layers; 0 for 8/3 of the width where gated, else four times the width.
            rotary_base: Ratio of the longest to the shortest wavelength of the rotary positions, nearly.
            decoder_channels: Channels of the finest decoder map; every coarser map has twice those of the next.
            feed_forward: A sparse layer in the place of dense feed-forward layers, as in
                `moe(experts=swiglu(n=8), router=topk(k=2), every=2)`; None for dense layers only.
        """

        width: int = 288
        depth: int = 8
        heads: int = 6
        patch: tuple[int, ...] = (8, 8, 8)
        registers: int = 0
        mlp: str = "swiglu"
        hidden: int = 0
        rotary_base: float = 100.0
        decoder_channels: int = 32
        feed_forward: Any = part("layers", None)

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        patch = _checked_patch(config)
        levels = _strides(patch)
        self.patch, self.rotary_base = patch, config.rotary_base
        self.head_dim = config.width // config.heads
        self.channels = tuple(config.decoder_channels * 2**i for i in reversed(range(len(levels) - 1)))
        self.strides = tuple(levels[1:])
        self.bottleneck_channels = config.width
        self.size_divisor = patch
        hidden = config.hidden or round(config.width * (4 if config.mlp == "mlp" else 8 / 3))
        spec = config.feed_forward
        sparse = [] if spec is None else places(config.depth, spec, "vit3d")
        self.embed = nn.Conv3d(in_channels, config.width, patch, stride=patch)
        self.register_tokens = nn.Parameter(torch.empty(config.registers, config.width)) if config.registers else None
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                heads=config.heads,
                feed_forward=config.mlp,
                hidden=hidden,
                sparse=spec if index in sparse else None,
                stride=patch,
                registers=config.registers,
                is_last=index == config.depth - 1,
                owner="encoder 'vit3d'",
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.decoder = UpsamplingDecoder(config.width, self.channels, levels)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        run = partial(self._pyramid, context=context)
        return on_padded(run, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor, context: MapContext) -> Pyramid:
        embedded_BCDHW = self.embed(x_BCDHW)
        batch, _, d, h, w = embedded_BCDHW.shape
        context = context.with_stride(self.patch)
        angles_TF = rotary_angles((d, h, w), self.head_dim, self.rotary_base, x_BCDHW.device)
        x_BTC = embedded_BCDHW.flatten(2).transpose(1, 2)
        registers = 0
        if self.register_tokens is not None:
            registers = self.register_tokens.shape[0]
            x_BTC = torch.cat([self.register_tokens.to(x_BTC.dtype).expand(batch, -1, -1), x_BTC], dim=1)
        routings: list[Routing] = []
        for block in self.blocks:
            x_BTC, routing = block(x_BTC, (d, h, w), angles_TF, context)
            routings += [routing] if routing is not None else []
        tokens_BTC = self.norm(x_BTC[:, registers:])
        bottleneck = tokens_BTC.transpose(1, 2).unflatten(2, (d, h, w)).contiguous()
        return Pyramid(self.decoder(bottleneck), bottleneck, tuple(routings))

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills the registers, and keeps the variance through the embedding, which no ReLU follows."""
        init.trunc_normal_(self.embed.weight, std=(self.embed.weight[0].numel()) ** -0.5)
        if self.register_tokens is not None:
            init.trunc_normal_(self.register_tokens, std=std)


def _checked_patch(config: ViT3D.Config) -> Stride:
    at_least(1, "vit3d", width=config.width, depth=config.depth, heads=config.heads)
    at_least(1, "vit3d", decoder_channels=config.decoder_channels)
    at_least(0, "vit3d", registers=config.registers, hidden=config.hidden)
    at_least(1, "vit3d", rotary_base=config.rotary_base)
    if config.width % (6 * config.heads):
        step = 6 * config.heads
        fitting = max(step, round(config.width / step) * step)
        raise InputError(
            f"vit3d turns a third of each head's channels for each axis, in pairs: width / heads is a multiple of 6, "
            f"got {config.width} / {config.heads}",
            hint=f"width={fitting} with heads={config.heads}",
        )
    patch = config.patch
    if len(patch) != 3 or any(side < 1 or side & (side - 1) for side in patch) or max(patch) == 1:
        raise InputError(
            f"patch of vit3d is three powers of two, of which one is above 1, got {list(patch)}",
            hint="patch=[8, 8, 8], or patch=[8, 8, 4] for thick slices",
        )
    return (patch[0], patch[1], patch[2])


def _strides(patch: Stride) -> list[Stride]:
    """The strides of the tokens and of the decoder maps, coarse to fine; the coarsest axes are refined first."""
    strides = [patch]
    while max(strides[-1]) > 1:
        limit = max(strides[-1]) // 2
        d, h, w = strides[-1]
        strides.append((min(d, limit), min(h, limit), min(w, limit)))
    return strides
