"""MedNeXt (Roy et al. 2023, arXiv 2303.09975) through MONAI, with its decoder pyramid exposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mome.encoders.base import Encoder, Pyramid, isotropic
from mome.encoders.padding import on_padded
from mome.errors import InputError, did_you_mean
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least


class _Size(NamedTuple):
    """Blocks and expansion ratios of the encoder stages, fine to coarse, and of the bottleneck.

    The decoder mirrors the encoder.
    """

    blocks: tuple[int, int, int, int]
    ratios: tuple[int, int, int, int]
    bottleneck_blocks: int
    bottleneck_ratio: int


# The four sizes of the paper (its table of configurations), as MONAI's `create_mednext` has them.
SIZES = {
    "S": _Size((2, 2, 2, 2), (2, 2, 2, 2), 2, 2),
    "B": _Size((2, 2, 2, 2), (2, 3, 4, 4), 2, 4),
    "M": _Size((3, 4, 4, 4), (2, 3, 4, 4), 4, 4),
    "L": _Size((3, 4, 8, 8), (3, 4, 8, 8), 8, 8),
}


class MedNeXt(Encoder):
    """MONAI's network with residual connections and without its output layer.

    Source: Roy et al. 2023 (arXiv 2303.09975).

    The four decoder maps have strides 8, 4, 2, 1 and the bottleneck has stride 16. Every block is a depthwise
    convolution, a group norm of one channel each, an expansion, GELU and a compression.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `mednext`.

        Args:
            size: `S`, `B`, `M` or `L`, the sizes of the paper.
            kernel_size: Side of the depthwise kernels, odd; 3 or 5 in the paper.
            filters: Channels of the finest stage; 32 in the paper.
        """

        size: str = "S"
        kernel_size: int = 3
        filters: int = 32

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        if config.size not in SIZES:
            raise InputError(
                f"size of mednext is {', '.join(SIZES)}, got {config.size!r:.40}{did_you_mean(config.size, SIZES)}"
            )
        at_least(1, "mednext", kernel_size=config.kernel_size, filters=config.filters)
        if config.kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size of mednext is odd, got {config.kernel_size}", hint=f"kernel_size={config.kernel_size + 1}"
            )
        from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt

        size = SIZES[config.size]
        self.network = MonaiMedNeXt(
            spatial_dims=3,
            init_filters=config.filters,
            in_channels=in_channels,
            out_channels=1,
            encoder_expansion_ratio=size.ratios,
            decoder_expansion_ratio=size.ratios[::-1],
            bottleneck_expansion_ratio=size.bottleneck_ratio,
            kernel_size=config.kernel_size,
            use_residual_connection=True,
            blocks_down=size.blocks,
            blocks_bottleneck=size.bottleneck_blocks,
            blocks_up=size.blocks[::-1],
        )
        del self.network.out_0
        self.channels = tuple(config.filters * factor for factor in (8, 4, 2, 1))
        self.strides = isotropic((8, 4, 2, 1))
        self.bottleneck_channels = 16 * config.filters
        self.size_divisor = (16, 16, 16)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        return on_padded(self._pyramid, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor) -> Pyramid:
        network = self.network
        x, stages = network.stem(x_BCDHW), []
        for blocks, down in zip(network.enc_stages, network.down_blocks, strict=True):
            x = blocks(x)
            stages.append(x)
            x = down(x)
        x = bottleneck = network.bottleneck(x)
        maps = []
        for up, blocks, skip in zip(network.up_blocks, network.dec_stages, reversed(stages), strict=True):
            x = blocks(up(x) + skip)
            maps.append(x)
        return Pyramid(tuple(maps), bottleneck)
