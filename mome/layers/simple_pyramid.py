"""Maps of several resolutions from the last map of a plain vision transformer."""

from __future__ import annotations

from torch import Tensor, nn

from mome.layers.instance_norm import InstanceNorm

Stride = tuple[int, int, int]


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527) for slices of a volume.

    It is made from the last map alone: transposed convolutions double its resolution once and twice, the map itself is
    the third, and a max pooling gives the coarsest. Each doubling halves the channels. A stride that is odd is not
    divided, so that a patch of 14 pixels gives strides 7, 14 and 28.

    Attributes:
        channels: Channels of the maps, fine to coarse.
        strides: Strides of the maps in a slice, fine to coarse.

    Args:
        width: Channels of the last map.
        stride: Its stride in a slice.
        plane: 1 for the axes of a slice, 0 for the axis across the slices, which keeps its resolution.
    """

    def __init__(self, width: int, stride: int, plane: Stride) -> None:
        super().__init__()
        step = (1 + plane[0], 1 + plane[1], 1 + plane[2])
        self.finer = nn.ModuleList()
        self.channels: tuple[int, ...] = (width,)
        self.strides: tuple[int, ...] = (stride,)
        while len(self.finer) < 2 and self.strides[0] % 2 == 0 and self.channels[0] % 2 == 0:
            channels = self.channels[0]
            self.finer.append(
                nn.Sequential(
                    nn.ConvTranspose3d(channels, channels // 2, step, stride=step, bias=False),
                    InstanceNorm(channels // 2),
                    nn.GELU(),
                )
            )
            self.channels = (channels // 2, *self.channels)
            self.strides = (self.strides[0] // 2, *self.strides)
        self.coarser = nn.MaxPool3d(step)
        self.channels += (width,)
        self.strides += (2 * stride,)

    def forward(self, x_BCDHW: Tensor) -> list[Tensor]:
        """The last map (B, C, D, H, W) → the maps, fine to coarse."""
        maps = [x_BCDHW]
        for layer in self.finer:
            maps.insert(0, layer(maps[0]))
        return [*maps, self.coarser(x_BCDHW)]
