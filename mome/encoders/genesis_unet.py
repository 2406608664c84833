"""The 3D U-Net of Models Genesis (Zhou et al. 2019, arXiv 1908.06912).

It is one of the backbones of the CLIP-Driven Universal Model (Liu et al. 2023, arXiv 2301.00785).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, isotropic
from mome.encoders.padding import on_padded
from mome.layers.instance_norm import InstanceNorm
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least


class GenesisUNet(Encoder):
    """Four stages of two convolutions with max pooling between them; the bottleneck has stride 8.

    Source: Models Genesis (arXiv 1908.06912).

    The published network normalises with the statistics of the batch it is given, in inference too, where a batch is
    one patch. Here every volume is normalised by its own statistics, which is the same for one patch and lets no patch
    change the mask of another. A bias before such a normalisation has no effect, so the convolutions have none.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `genesis_unet`.

        Args:
            width: Channels of the first convolution; 32 in the published network. Stage i ends with 2·width·2^i.
        """

        width: int = 32

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        at_least(1, "genesis_unet", width=config.width)
        widths = [2 * config.width * 2**stage for stage in range(4)]
        self.down = nn.ModuleList(
            _two_convolutions(in_channels if stage == 0 else widths[stage - 1], width // 2, width)
            for stage, width in enumerate(widths)
        )
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ModuleList(nn.ConvTranspose3d(width, width, 2, stride=2) for width in reversed(widths[1:]))
        self.fuse = nn.ModuleList(_two_convolutions(3 * width, width, width) for width in reversed(widths[:-1]))
        self.channels = tuple(reversed(widths[:-1]))
        self.strides = isotropic((4, 2, 1))
        self.bottleneck_channels = widths[-1]
        self.size_divisor = (8, 8, 8)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        return on_padded(self._pyramid, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor) -> Pyramid:
        x, stages = x_BCDHW, []
        for level, convolutions in enumerate(self.down):
            x = convolutions(self.pool(x) if level else x)
            stages.append(x)
        maps = []
        for up, fuse, skip in zip(self.up, self.fuse, reversed(stages[:-1]), strict=True):
            x = fuse(torch.cat([up(x), skip], dim=1))
            maps.append(x)
        return Pyramid(tuple(maps), stages[-1])


def _two_convolutions(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    """Two 3×3×3 convolutions, each followed by an instance norm and ReLU."""
    return nn.Sequential(*_convolution(in_channels, middle), *_convolution(middle, out_channels))


def _convolution(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
        InstanceNorm(out_channels),
        nn.ReLU(inplace=True),
    )
