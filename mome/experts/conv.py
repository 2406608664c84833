"""Convolutional experts, which see the neighbourhood of a voxel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mome.errors import InputError
from mome.experts.base import MapExperts
from mome.experts.gates import experts_to_run
from mome.map_context import MapContext
from mome.registry import at_least


class ConvExperts(MapExperts):
    """y_e = pointwise_e(GELU(depthwise_e(x))), with a k × k × k depthwise convolution; our choice.

    The map is padded with zeros, and keeps its size. Unlike token experts, every expert computes the whole map,
    whatever its gates: E experts cost E · (k³ + C) · C multiplications per voxel, and training keeps 2 · E maps. In
    eval, experts whose gates are zero at every voxel do not run (`mome.experts.gates`). The kernel counts voxels of the
    map; voxels of different side lengths are not told apart.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `conv`.

        Args:
            n: Number of experts.
            kernel: Side k of the depthwise kernel in voxels of the map, an odd number.
        """

        n: int = 4
        kernel: int = 3

    def __init__(self, config: Config, *, dim: int) -> None:
        super().__init__()
        at_least(1, "conv experts", n=config.n, kernel=config.kernel)
        if config.kernel % 2 == 0:
            raise InputError(
                f"kernel of conv experts is an odd number, got {config.kernel}: an even one would shift the map",
                hint=f"conv(kernel={config.kernel + 1})",
            )
        self.num_experts = config.n
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim),
                nn.GELU(),
                nn.Conv3d(dim, dim, 1),
            )
            for _ in range(config.n)
        )

    def forward(self, x_BDHWC: Tensor, gates_BDHWE: Tensor, context: MapContext) -> Tensor:
        x_BCDHW = x_BDHWC.movedim(-1, 1)
        y_BDHWC = x_BDHWC.new_zeros(x_BDHWC.shape, dtype=gates_BDHWE.dtype)
        for expert in experts_to_run(gates_BDHWE, self.training):
            y_BDHWC = y_BDHWC + gates_BDHWE[..., expert, None] * self.layers[expert](x_BCDHW).movedim(1, -1)
        return y_BDHWC.to(x_BDHWC.dtype)
