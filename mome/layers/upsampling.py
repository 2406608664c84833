"""A pyramid of maps made from one coarse map by transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mome.layers.instance_norm import InstanceNorm

Stride = tuple[int, int, int]


class UpsamplingDecoder(nn.Module):
    """Transposed convolution → instance norm → GELU, once for each finer stride.

    The decoder of Primus (Wald et al. 2025, arXiv 2503.01835) has the same form; the widths and the norm
    are our choice.

    Args:
        in_channels: Channels of the coarse map.
        channels: Channels of the finer maps, coarse to fine.
        strides: Strides (D, H, W) of the coarse map and then of the finer maps; each is a multiple of the next.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], strides: Sequence[Stride]) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        widths = (in_channels, *channels)
        for level, (coarse, fine) in enumerate(zip(strides[:-1], strides[1:], strict=True)):
            step = (coarse[0] // fine[0], coarse[1] // fine[1], coarse[2] // fine[2])
            self.steps.append(
                nn.Sequential(
                    nn.ConvTranspose3d(widths[level], widths[level + 1], step, stride=step, bias=False),
                    InstanceNorm(widths[level + 1]),
                    nn.GELU(),
                )
            )

    def forward(self, x_BCDHW: Tensor) -> tuple[Tensor, ...]:
        """The coarse map → the finer maps, coarse to fine."""
        maps = []
        for step in self.steps:
            x_BCDHW = step(x_BCDHW)
            maps.append(x_BCDHW)
        return tuple(maps)
