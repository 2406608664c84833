"""Convolution blocks of the compact 3D networks."""

from __future__ import annotations

from torch import Tensor, nn

from mome.errors import InputError
from mome.layers.instance_norm import InstanceNorm


def norm_layer(name: str, channels: int) -> nn.Module:
    """Builds a normalisation layer: `instance` (affine instance norm) or `group` (groups of 8 channels).

    Raises:
        InputError: The name is unknown, or the channels do not divide into groups.
    """
    if name == "instance":
        return InstanceNorm(channels)
    if name == "group":
        groups = max(1, channels // 8)
        if channels % groups:
            raise InputError(f"norm 'group' cannot divide {channels} channels by 8", hint="use multiples of 8")
        return nn.GroupNorm(groups, channels)
    raise InputError(f"norm is 'instance' or 'group', got {name!r}")


class ConvBlock(nn.Module):
    """A 3×3×3 convolution, a normalisation and a leaky ReLU (slope 0.01, as in nnU-Net)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "instance") -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = norm_layer(norm, out_channels)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x_BCDHW)))


class ConvStack(nn.Sequential):
    """A chain of `depth` convolution blocks; the first one changes the channels and the resolution."""

    def __init__(
        self, in_channels: int, out_channels: int, *, depth: int, stride: int = 1, norm: str = "instance"
    ) -> None:
        blocks = [ConvBlock(in_channels, out_channels, stride=stride, norm=norm)]
        blocks += [ConvBlock(out_channels, out_channels, norm=norm) for _ in range(depth - 1)]
        super().__init__(*blocks)
