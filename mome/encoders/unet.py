"""A compact 3D U-Net whose decoder is built from its encoder.

After Ronneberger et al. 2015 and Isensee et al. 2021 (nnU-Net): strided convolutions, instance
normalisation, leaky ReLU. The sizes are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, isotropic
from mome.errors import InputError
from mome.layers.blocks import ConvStack
from mome.layers.decoder import UNetDecoder
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least


class UNet(Encoder):
    """U-Net encoder and decoder; the bottleneck has stride 2^(stages − 1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `unet`.

        Args:
            channels: Channels of the stages, fine to coarse.
            depth: Convolutions in each encoder stage.
            decoder_depth: Convolutions in each decoder stage.
            norm: `instance` or `group`.
        """

        channels: tuple[int, ...] = (32, 64, 128, 256, 320)
        depth: int = 2
        decoder_depth: int = 2
        norm: str = "instance"

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        widths = tuple(config.channels)
        if len(widths) < 2:
            raise InputError(f"a U-Net needs at least two stages, got channels={list(widths)}")
        at_least(1, "unet", channels=min(widths), depth=config.depth, decoder_depth=config.decoder_depth)
        levels = len(widths)
        self.strides = isotropic(tuple(2**level for level in reversed(range(levels - 1))))
        self.channels = tuple(reversed(widths[:-1]))
        self.bottleneck_channels = widths[-1]
        self.size_divisor = isotropic((2 ** (levels - 1),))[0]
        self.stages = nn.ModuleList(
            ConvStack(
                in_channels if level == 0 else widths[level - 1],
                widths[level],
                depth=config.depth,
                stride=1 if level == 0 else 2,
                norm=config.norm,
            )
            for level in range(levels)
        )
        self.decoder = UNetDecoder(
            widths,
            isotropic(tuple(2**level for level in range(levels))),
            depth=config.decoder_depth,
            norm=config.norm,
        )

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        stages = []
        x = x_BCDHW
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        return Pyramid(self.decoder(stages), stages[-1])
