"""The U-Net decoder, built from the channels and strides of any encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mome.layers.blocks import ConvStack


class UNetDecoder(nn.Module):
    """One step for each encoder stage but the deepest: transposed convolution, skip connection, convolutions.

    Args:
        channels: Channels of the encoder's stages, fine to coarse (the last is the bottleneck).
        strides: Strides (D, H, W) of the stages relative to the input, fine to coarse; each must divide the next.
        depth: Convolution blocks in each decoder stage.
        norm: See `mome.layers.blocks.norm_layer`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[tuple[int, int, int]],
        *,
        depth: int = 1,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        self.up, self.fuse = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(channels) - 1)):
            (d, h, w), (fine_d, fine_h, fine_w) = strides[level + 1], strides[level]
            step = (d // fine_d, h // fine_h, w // fine_w)
            self.up.append(nn.ConvTranspose3d(channels[level + 1], channels[level], step, stride=step))
            self.fuse.append(ConvStack(2 * channels[level], channels[level], depth=depth, norm=norm))

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, ...]:
        """Turns encoder stages, fine to coarse, into decoder maps, coarse to fine.

        Args:
            stages: The stages. Each is taken out of the list, so that without gradients its memory is free once it is
                joined with the upsampled map: the convolution that follows needs more than any other.
        """
        x, maps = stages.pop(), []
        for up, fuse, _ in zip(self.up, self.fuse, range(len(stages)), strict=True):
            x = fuse(torch.cat([up(x), stages.pop()], dim=1))  # (B, C_s, D_s, H_s, W_s)
            maps.append(x)
        return tuple(maps)
