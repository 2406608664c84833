"""Swin UNETR (Hatamizadeh et al. 2022, arXiv 2201.01266) through MONAI, with its decoder pyramid exposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mome.encoders.base import Encoder, Pyramid, isotropic
from mome.encoders.padding import on_padded
from mome.encoders.swin_feed_forward import replace_feed_forward, routings_of
from mome.errors import InputError
from mome.map_context import DEFAULT_CONTEXT, MapContext
from mome.registry import at_least, part


class SwinUNETR(Encoder):
    """MONAI's network without its output layer, so that weights published for it keep their meaning.

    Source: Hatamizadeh et al. 2022 (arXiv 2201.01266).

    The five decoder maps have strides 16, 8, 4, 2, 1 and the bottleneck has stride 32.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `swin_unetr`.

        Args:
            feature_size: Channels of the finest stage, a multiple of 12.
            depths: Swin blocks in each of the four stages.
            num_heads: Attention heads in each of the four stages.
            window_size: Side of an attention window in tokens.
            drop_rate, drop_path_rate: Dropout of units and of whole blocks, from 0 to below 1.
            use_v2: Whether a convolution block precedes each stage (Swin UNETR v2).
            feed_forward: A sparse layer in the place of the blocks' MLPs, as in
                `moe(experts=swiglu(n=8), router=topk(k=2), every=2)`; None for MLPs only.
        """

        feature_size: int = 48
        depths: tuple[int, ...] = (2, 2, 2, 2)
        num_heads: tuple[int, ...] = (3, 6, 12, 24)
        window_size: int = 7
        drop_rate: float = 0.0
        drop_path_rate: float = 0.0
        use_v2: bool = False
        feed_forward: Any = part("layers", None)

    def __init__(self, config: Config, *, in_channels: int = 1) -> None:
        super().__init__()
        _check(config)
        from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

        with _LinspaceOnCPU():
            self.network = MonaiSwinUNETR(
                in_channels=in_channels,
                out_channels=1,
                feature_size=config.feature_size,
                depths=tuple(config.depths),
                num_heads=tuple(config.num_heads),
                window_size=config.window_size,
                drop_rate=config.drop_rate,
                dropout_path_rate=config.drop_path_rate,
                use_v2=config.use_v2,
            )
        del self.network.out
        if config.feed_forward is not None:
            replace_feed_forward(self.network.swinViT, config.feed_forward, config.feature_size)
        width = config.feature_size
        self.channels = (8 * width, 4 * width, 2 * width, width, width)
        self.strides = isotropic((16, 8, 4, 2, 1))
        self.bottleneck_channels = 16 * width
        self.size_divisor = (32, 32, 32)

    def forward(self, x_BCDHW: Tensor, context: MapContext = DEFAULT_CONTEXT) -> Pyramid:
        with routings_of(context) as routings:
            pyramid = on_padded(self._pyramid, x_BCDHW, divisor=self.size_divisor, strides=self.strides)
        return pyramid._replace(routings=tuple(routings))

    def _pyramid(self, x_BCDHW: Tensor) -> Pyramid:
        network = self.network
        hidden = network.swinViT(x_BCDHW, network.normalize)
        bottleneck = network.encoder10(hidden[4])  # stride 32
        map_16 = network.decoder5(bottleneck, hidden[3])
        map_8 = network.decoder4(map_16, network.encoder4(hidden[2]))
        map_4 = network.decoder3(map_8, network.encoder3(hidden[1]))
        map_2 = network.decoder2(map_4, network.encoder2(hidden[0]))
        map_1 = network.decoder1(map_2, network.encoder1(x_BCDHW))
        return Pyramid((map_16, map_8, map_4, map_2, map_1), bottleneck)

    @torch.no_grad()
    def init_weights_(self, init: ModuleType, std: float) -> None:
        """Fills MONAI's bare parameters and its index buffer, which the base recipe of transformers does not know."""
        from monai.networks.nets.swin_unetr import WindowAttention

        for module in self.modules():
            if isinstance(module, WindowAttention):
                init.trunc_normal_(module.relative_position_bias_table, std=0.02)
                index_NN = relative_position_index(module.window_size)
                init.copy_(module.relative_position_index, index_NN.to(module.relative_position_bias_table.device))


def _check(config: SwinUNETR.Config) -> None:
    if config.feature_size < 1 or config.feature_size % 12:
        raise InputError(
            f"feature_size of swin_unetr is a multiple of 12, got {config.feature_size}",
            hint="feature_size=48 is the published size, 24 a smaller one",
        )
    for name in ("depths", "num_heads"):
        if len(getattr(config, name)) != 4:  # MONAI accepts fewer and fails in its first forward
            raise InputError(f"{name} of swin_unetr are four numbers, got {list(getattr(config, name))}")
    at_least(1, "swin_unetr", depths=min(config.depths), num_heads=min(config.num_heads))
    at_least(1, "swin_unetr", window_size=config.window_size)
    widths = [config.feature_size * 2**stage for stage in range(4)]
    if any(width % heads for width, heads in zip(widths, config.num_heads, strict=True)):
        raise InputError(f"num_heads of swin_unetr divide the stages' widths {widths}, got {list(config.num_heads)}")
    for name in ("drop_rate", "drop_path_rate"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} of swin_unetr is at least 0 and below 1, got {getattr(config, name)}")


class _LinspaceOnCPU(TorchFunctionMode):
    """Keeps `torch.linspace` on the CPU: MONAI reads drop-path rates from one, and meta tensors hold no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def relative_position_index(window: Sequence[int]) -> Tensor:
    """Row of the bias table for every pair of voxels of a window: (N, N) with N = product of `window`."""
    axes = [torch.arange(size) for size in window]
    grid_3N = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    offset_3NN = grid_3N[:, :, None] - grid_3N[:, None, :]
    index_NN = torch.zeros_like(offset_3NN[0])
    for axis, size in enumerate(window):
        index_NN = index_NN * (2 * size - 1) + offset_3NN[axis] + size - 1
    return index_NN
