"""A compact 3D U-Net whose decoder is built from its encoder.

After Ronneberger et al. 2015 and Isensee et al. 2021 (nnU-Net): strided convolutions, instance
normalisation, leaky ReLU. The sizes are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mome.encoders.base import Encoder, Pyramid, isotropic
from mome.encoders.padding import on_padded
from mome.errors import InputError
from mome.layers.blocks import ConvStack
from mome.layers.decoder import UNetDecoder
from mome.layers.sparse import SparseResidual, stages_with_layer
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least, part
from mome.routers.routing import Routing


class UNet(Encoder):
    """U-Net encoder and decoder (arXiv 1505.04597); the bottleneck has stride 2^(stages − 1).

    The sizes are our choice.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `unet`.

        Args:
            channels: Channels of the stages, fine to coarse.
            depth: Convolutions in each encoder stage.
            decoder_depth: Convolutions in each decoder stage.
            norm: `instance` or `group`.
            layer: A sparse layer with a residual after stages of the encoder, as in
                `moe(experts=swiglu(n=8), router=topk(k=2))`; None for none.
            layer_stages: The stages that it follows, 0 is the finest; empty for every n-th stage, with the layer's
                `every`. The cost grows with the voxels: a stage has eight times those of the next.
        """

        channels: tuple[int, ...] = (32, 64, 128, 256, 320)
        depth: int = 2
        decoder_depth: int = 2
        norm: str = "instance"
        layer: Any = part("layers", None)
        layer_stages: tuple[int, ...] = ()

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

        self.sparse = nn.ModuleDict(
            {
                str(level): SparseResidual(
                    config.layer,
                    channels=widths[level],
                    stride=(2**level, 2**level, 2**level),
                    norm=config.norm,
                    owner="encoder 'unet'",
                )
                for level in stages_with_layer(config.layer, config.layer_stages, levels, "unet")
            }
        )

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        run = partial(self._pyramid, context=context)
        return on_padded(run, x_BCDHW, divisor=self.size_divisor, strides=self.strides)

    def _pyramid(self, x_BCDHW: Tensor, context: MapContext) -> Pyramid:
        stages = []
        routings: list[Routing] = []
        x = x_BCDHW
        for level, stage in enumerate(self.stages):
            x = stage(x)
            if str(level) in self.sparse:
                x, routing = self.sparse[str(level)](x, context.with_stride((2**level,) * 3))
                routings += [routing] if routing is not None else []
            stages.append(x)
        del x  # the decoder takes the stages out of their list
        bottleneck = stages[-1]
        return Pyramid(self.decoder(stages), bottleneck, tuple(routings))
